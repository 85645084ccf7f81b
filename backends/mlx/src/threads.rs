//! Threads for devices, used again.
//!
//! MLX makes a stream for each thread that computes and, on a CPU, a thread for each stream. Neither comes to an end, not
//! even with the thread it was made for. So a thread whose model is unloaded waits for the next one, and there are about
//! as many of them as models were loaded at the same time.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

type Job = Box<dyn FnOnce() + Send>;

/// Threads without a job. Each takes one at a time.
static IDLE: Mutex<Vec<mpsc::SyncSender<Job>>> = Mutex::new(Vec::new());

fn idle() -> MutexGuard<'static, Vec<mpsc::SyncSender<Job>>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `job` on a thread that waits for one, or else on a new one.
pub fn spawn(job: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut job: Job = Box::new(job);
    loop {
        let Some(thread) = idle().pop() else { break };
        match thread.try_send(job) {
            Ok(()) => return Ok(()),
            Err(mpsc::TrySendError::Full(back) | mpsc::TrySendError::Disconnected(back)) => job = back,
        }
    }
    let (jobs, inbox) = mpsc::sync_channel::<Job>(1);
    thread::Builder::new().name("mlx device".into()).spawn(move || {
        // What a job leaves behind when it panics is its own; MLX's state is none of it.
        let _ = catch_unwind(AssertUnwindSafe(job));
        loop {
            idle().push(jobs.clone());
            let Ok(job) = inbox.recv() else { return };
            let _ = catch_unwind(AssertUnwindSafe(job));
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;

    /// Runs so many jobs at the same time, and tells on which threads.
    fn at_once(count: usize) -> BTreeSet<String> {
        let (here, there) = mpsc::channel();
        let gates: Vec<_> = (0..count)
            .map(|_| {
                let (gate, closed) = mpsc::channel::<()>();
                let here = here.clone();
                spawn(move || {
                    here.send(format!("{:?}", thread::current().id())).unwrap();
                    closed.recv().ok();
                })
                .unwrap();
                gate
            })
            .collect();
        let threads = (0..count).map(|_| there.recv().unwrap()).collect();
        let before = idle().len();
        drop(gates);
        while idle().len() < before + count {
            thread::sleep(Duration::from_millis(1));
        }
        threads
    }

    // One test, since all of a process share the threads.
    #[test]
    fn threads_are_used_again_even_after_a_panic() {
        let three = at_once(3);
        assert_eq!(three.len(), 3, "jobs that run at the same time have a thread each");
        assert!(at_once(2).is_subset(&three));
        let waiting = idle().len();
        spawn(|| panic!("a job that fails")).unwrap();
        while idle().len() < waiting {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(at_once(3), three);
    }
}
