//! The threads of the process. Each has an event loop of its own and the connections of its
//! clients; the first one has the databases and the bus, too.
//!
//! So a message that comes in on the first thread is written, acknowledged and delivered without
//! waking another thread: waking and sleeping are a fifth of what a message costs at a moderate
//! pace.

use std::io;
use tokio::runtime::{Builder, Handle, Runtime, RuntimeMetrics};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

/// Threads that run until this is dropped. What they were running then is dropped, too.
pub struct Threads(Vec<Thread>);

struct Thread {
    handle: Handle,
    starts: mpsc::UnboundedSender<Start>,
}

/// Makes a future on its thread and starts it there: the future itself need not be `Send`.
type Start = Box<dyn FnOnce() + Send>;

impl Threads {
    /// `count` threads; there must be one.
    ///
    /// # Errors
    /// If the system gives no thread or no event loop.
    pub fn start(count: usize) -> io::Result<Self> {
        (0..count)
            .map(Thread::start)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The event loop of the databases and the bus. A pool of `mysql_async` must not be used by
    /// several single-threaded runtimes.
    #[must_use]
    pub fn store(&self) -> &Handle {
        &self.0[0].handle
    }

    /// What the event loop of each thread counts.
    #[must_use]
    pub fn metrics(&self) -> Vec<RuntimeMetrics> {
        self.0
            .iter()
            .map(|thread| thread.handle.metrics())
            .collect()
    }

    /// Runs a future on each thread.
    pub fn spawn_on_each<F: Future<Output = ()> + 'static>(
        &self,
        mut future: impl FnMut() -> Box<dyn FnOnce() -> F + Send>,
    ) {
        for thread in &self.0 {
            let future = future();
            // A thread that has ended runs nothing any more.
            let _ = thread.starts.send(Box::new(move || {
                tokio::task::spawn_local(future());
            }));
        }
    }
}

impl Thread {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (starts, waiting) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name(format!("chat-{number}"))
            .spawn(move || run(runtime, waiting))?;
        Ok(Self { handle, starts })
    }
}

fn run(runtime: Runtime, mut waiting: mpsc::UnboundedReceiver<Start>) {
    LocalSet::new().block_on(&runtime, async move {
        while let Some(start) = waiting.recv().await {
            start();
        }
    });
    // A call to a database file may be under way, on a thread that cannot be interrupted.
    runtime.shutdown_background();
}
