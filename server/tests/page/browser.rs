//! The page in a headless Chromium, and what the browser had to say about it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use chromiumoxide::{
    Page,
    browser::{Browser, BrowserConfig},
    cdp::{
        browser_protocol::{
            emulation::{MediaFeature, SetDeviceMetricsOverrideParams},
            input::{DispatchKeyEventParams, DispatchKeyEventType},
            log::EventEntryAdded,
            network::{EnableParams, EventRequestWillBeSent},
            page::CaptureScreenshotFormat,
        },
        js_protocol::runtime::{EventConsoleApiCalled, EventExceptionThrown},
    },
    detection::{DetectionOptions, default_executable},
    page::ScreenshotParams,
};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::task::JoinHandle;

/// Longest that something on the page may take to come about. No test is about how long it does.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the page fetched: the address, and the key that went with it.
type Fetched = (String, Option<String>);

/// A browser with the page open.
pub struct Tab {
    browser: Browser,
    pub page: Page,
    /// What the browser complained about: exceptions, console errors and warnings, violations of the policy.
    complaints: Arc<Mutex<Vec<String>>>,
    requests: Arc<Mutex<Vec<Fetched>>>,
    tasks: Vec<JoinHandle<()>>,
    _profile: tempfile::TempDir,
}

/// Where Chromium is. Where it is not, the test is skipped, except in CI.
pub fn chromium() -> Option<PathBuf> {
    let found = default_executable(DetectionOptions { msedge: false, unstable: false });
    if let Ok(path) = found {
        return Some(path);
    }
    assert!(std::env::var_os("CI").is_none(), "chromium has to be there in CI");
    println!("skipped: page (chromium is not there)");
    None
}

impl Tab {
    pub async fn open(chromium: &Path, url: &str) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let config = BrowserConfig::builder()
            .chrome_executable(chromium)
            .user_data_dir(profile.path())
            .no_sandbox()
            .new_headless_mode()
            .window_size(1100, 900)
            .viewport(None)
            .args(["disable-gpu", "disable-quic", "no-proxy-server", "disable-component-update", "no-first-run"])
            .launch_timeout(Duration::from_secs(60))
            .build()
            .unwrap();
        let (browser, mut handler) = Browser::launch(config).await.unwrap();
        let driving = tokio::spawn(async move { while handler.next().await.is_some() {} });
        let page = browser.new_page("about:blank").await.unwrap();
        page.execute(EnableParams::default()).await.unwrap();
        page.enable_log().await.unwrap();
        page.enable_runtime().await.unwrap();
        let mut tab = Self {
            browser,
            page,
            complaints: Arc::default(),
            requests: Arc::default(),
            tasks: vec![driving],
            _profile: profile,
        };
        tab.listen().await;
        tab.size(1100, 900, 1.0).await;
        tab.page.goto(url).await.unwrap();
        tab.until("a model is listed", "document.querySelector('#model').value !== ''").await;
        tab
    }

    async fn listen(&mut self) {
        let (page, complaints) = (&self.page, &self.complaints);
        let mut entries = page.event_listener::<EventEntryAdded>().await.unwrap();
        let said = complaints.clone();
        self.tasks.push(tokio::spawn(async move {
            while let Some(event) = entries.next().await {
                said.lock().unwrap().push(format!("{:?}: {}", event.entry.level, event.entry.text));
            }
        }));
        let mut exceptions = page.event_listener::<EventExceptionThrown>().await.unwrap();
        let said = complaints.clone();
        self.tasks.push(tokio::spawn(async move {
            while let Some(event) = exceptions.next().await {
                said.lock().unwrap().push(format!("{:?}", event.exception_details));
            }
        }));
        let mut calls = page.event_listener::<EventConsoleApiCalled>().await.unwrap();
        let said = complaints.clone();
        self.tasks.push(tokio::spawn(async move {
            while let Some(event) = calls.next().await {
                said.lock().unwrap().push(format!("{:?}: {:?}", event.r#type, event.args));
            }
        }));
        let mut sent = page.event_listener::<EventRequestWillBeSent>().await.unwrap();
        let requests = self.requests.clone();
        self.tasks.push(tokio::spawn(async move {
            while let Some(event) = sent.next().await {
                let key = event.request.headers.inner().get("authorization").and_then(Value::as_str).map(String::from);
                requests.lock().unwrap().push((event.request.url.clone(), key));
            }
        }));
    }

    /// The value of an expression.
    pub async fn js<T: DeserializeOwned>(&self, expression: &str) -> T {
        self.page.evaluate_expression(expression).await.unwrap().into_value().unwrap()
    }

    /// Runs a statement.
    pub async fn run(&self, statement: &str) {
        self.page.evaluate_expression(statement).await.unwrap();
    }

    /// The text of the last element of a kind.
    pub async fn text(&self, selector: &str) -> String {
        self.js(&format!(
            "[...document.querySelectorAll({selector:?})].at(-1)?.innerText.replaceAll('\\u00a0', ' ') ?? ''"
        ))
        .await
    }

    /// Waits until an expression is true.
    pub async fn until(&self, what: &str, expression: &str) {
        let start = Instant::now();
        while !self.js::<bool>(&format!("Boolean({expression})")).await {
            if start.elapsed() > PATIENCE {
                let shown: String = self.js("document.body.innerText").await;
                panic!("it never came about that {what}; the page shows:\n{shown}\n{:?}", self.complaints.lock());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the last element of a kind has a text.
    pub async fn shows(&self, selector: &str, text: &str) {
        let holds = format!(
            "[...document.querySelectorAll({selector:?})].at(-1)?.innerText.replaceAll('\\u00a0', ' ').includes({text:?})"
        );
        self.until(&format!("{selector} shows {text:?}"), &holds).await;
    }

    /// Waits until the last answer is in a state.
    pub async fn answer_is(&self, state: &str) {
        let holds = format!("[...document.querySelectorAll('.assistant')].at(-1)?.dataset.state === {state:?}");
        self.until(&format!("the answer is {state}"), &holds).await;
    }

    /// Clicks, as a mouse does, the last element of a kind.
    pub async fn click(&self, selector: &str) {
        self.page.find_elements(selector).await.unwrap().last().expect(selector).click().await.unwrap();
    }

    /// Types into a field, as a keyboard does. A new line is typed with shift.
    pub async fn write(&self, selector: &str, text: &str) {
        let field = self.page.find_element(selector).await.unwrap();
        field.click().await.unwrap();
        self.run(&format!("document.querySelector({selector:?}).select()")).await;
        if text.is_empty() {
            field.press_key("Delete").await.unwrap();
        }
        for (at, line) in text.split('\n').enumerate() {
            if at > 0 {
                self.shift_enter().await;
            }
            field.type_str(line).await.unwrap();
        }
    }

    async fn shift_enter(&self) {
        for kind in [DispatchKeyEventType::KeyDown, DispatchKeyEventType::KeyUp] {
            let mut key = DispatchKeyEventParams::builder().r#type(kind.clone()).key("Enter").code("Enter");
            key = key.windows_virtual_key_code(13).modifiers(8);
            if kind == DispatchKeyEventType::KeyDown {
                key = key.text("\r");
            }
            self.page.execute(key.build().unwrap()).await.unwrap();
        }
    }

    pub async fn press(&self, selector: &str, key: &str) {
        let element = self.page.find_element(selector).await.unwrap();
        element.focus().await.unwrap().press_key(key).await.unwrap();
    }

    /// Writes a message and sends it with the Enter key.
    pub async fn say(&self, text: &str) {
        self.write("#prompt", text).await;
        self.press("#prompt", "Enter").await;
    }

    pub async fn size(&self, width: i64, height: i64, scale: f64) {
        let size = SetDeviceMetricsOverrideParams::new(width, height, scale, false);
        self.page.execute(size).await.unwrap();
    }

    pub async fn scheme(&self, scheme: &str) {
        let feature = MediaFeature { name: "prefers-color-scheme".into(), value: scheme.into() };
        self.page.emulate_media_features(vec![feature]).await.unwrap();
    }

    /// Writes a picture of the page to `page/NAME.png` in the target directory.
    pub async fn picture(&self, name: &str) {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("page");
        std::fs::create_dir_all(&folder).unwrap();
        let params = ScreenshotParams::builder().format(CaptureScreenshotFormat::Png).build();
        let file = folder.join(format!("{name}.png"));
        let png = self.page.save_screenshot(params, &file).await.unwrap();
        assert!(png.starts_with(b"\x89PNG"), "{}", file.display());
    }

    /// What the browser complained about since the last time.
    pub fn complaints(&self) -> Vec<String> {
        std::mem::take(&mut self.complaints.lock().unwrap())
    }

    pub fn requests(&self) -> Vec<Fetched> {
        self.requests.lock().unwrap().clone()
    }

    /// Ends the browser. The page has to have stayed with its server, and the browser content.
    pub async fn close(mut self, url: &str) {
        assert_eq!(self.complaints(), Vec::<String>::new());
        let requests = self.requests();
        assert!(requests.iter().any(|(address, _)| address.ends_with("/ui/app.js")), "{requests:?}");
        let elsewhere: Vec<_> = requests.iter().filter(|(address, _)| !address.starts_with(url)).collect();
        assert!(elsewhere.is_empty(), "fetched from elsewhere: {elsewhere:?}");
        self.browser.close().await.unwrap();
        self.browser.wait().await.unwrap();
        for task in self.tasks {
            task.abort();
        }
    }
}
