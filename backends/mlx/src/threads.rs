//! Threads for devices, used again, and threads beside them.
//!
//! MLX makes a stream for each thread that computes and, on a CPU, a thread for each stream. Neither comes to an end, not
//! even with the thread it was made for. So a thread whose model is unloaded waits for the next one, and there are about
//! as many of them as models were loaded at the same time.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use rayon::{ThreadPool, ThreadPoolBuilder};

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

/// Threads beside those of devices, for all of them together. They sleep when there is nothing to do: to start one for each
/// step takes longer than what it is to do.
static BESIDE: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    let spare = thread::available_parallelism().map_or(1, |cores| cores.get() - 1);
    let name = |index| format!("mlx beside {index}");
    ThreadPoolBuilder::new().num_threads(spare.clamp(1, BESIDE_MAX)).thread_name(name).build().ok()
});

/// Threads beside devices at most: more at work slow the one that submits.
const BESIDE_MAX: usize = 4;

/// Does `each` to `items` on other threads while `work` runs on this one. The answers are in no order.
pub fn beside<I: Send, A: Send, T>(
    items: Vec<I>,
    each: impl Fn(I) -> A + Sync,
    work: impl FnOnce() -> T,
) -> (T, Vec<A>) {
    let Some(pool) = BESIDE.as_ref().filter(|_| !items.is_empty()) else {
        return (work(), items.into_iter().map(each).collect());
    };
    let threads = pool.current_num_threads().min(items.len());
    let waiting = Mutex::new(items);
    let answers = Mutex::new(Vec::new());
    let take = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let done = pool.in_place_scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|_| {
                while let Some(item) = take() {
                    let answer = each(item);
                    answers.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
                }
            });
        }
        work()
    });
    (done, answers.into_inner().unwrap_or_else(PoisonError::into_inner))
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

    #[test]
    fn what_is_done_beside_is_done_once_each_while_the_work_goes_on() {
        let (here, there) = mpsc::sync_channel(0);
        let here = Mutex::new(here);
        let each = |item: u32| {
            here.lock().unwrap().send(item).unwrap();
            item * 2
        };
        // Nothing is answered before the work has taken it.
        let (taken, mut answers) = beside((0..20).collect(), each, || there.iter().take(20).collect::<BTreeSet<u32>>());
        answers.sort_unstable();
        assert_eq!(taken, (0..20).collect());
        assert_eq!(answers, (0..20).map(|item| item * 2).collect::<Vec<_>>());
        assert_eq!(beside(Vec::<u32>::new(), |item| item, || 7), (7, Vec::new()));
    }

    #[test]
    fn a_panic_beside_is_a_panic_here_and_the_threads_live_on() {
        let broken = catch_unwind(|| beside(vec![1, 0], |item: u32| 1 / item, || ()));
        assert!(broken.is_err());
        assert_eq!(beside(vec![1, 1], |item: u32| 1 / item, || ()), ((), vec![1, 1]));
    }
}
