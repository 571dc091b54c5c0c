//! `--supervise`: a small parent that owns the listening socket and starts a worker, which loads the model and serves.
//!
//! A CUDA context that a kernel broke can never be mended within its process, so the process must go. The parent has no
//! device: it lives on, answers 503 in the meantime, and starts the next worker. What the lost worker worked on is lost
//! with it; clients see their connections break.
//!
//! The two talk over what a process has anyway. The worker's standard input *is* the listening socket, and its standard
//! output is a socket pair: the worker says `ready` on it once it serves, ends in order when the parent writes to it, and
//! at once when the parent is gone.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{ExitStatus, Stdio, exit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bcg_server::HttpOptions;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::args::ServerArgs;
use crate::shutdown::Shutdown;

/// Set for a worker, to the number of workers before it.
const WORKER: &str = "BCG_WORKER";
/// What a worker says when it serves.
const READY: &str = "ready";
/// What a worker hears when it shall end: one byte.
const END: &[u8; 1] = b"e";
/// The time in which `max_restarts` count.
const RESTART_WINDOW: Duration = Duration::from_secs(600);
/// How much longer each restart within the window waits than the one before; the first one does not wait.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// How much longer than its own deadline a worker may take to end before it is killed.
const KILL_AFTER: Duration = Duration::from_secs(10);

/// The worker's side of its parent. A thread listens to it from the start, so that a parent that is gone ends the worker at
/// once, even while the model is loaded: it would keep the socket otherwise.
#[derive(Debug)]
pub(crate) struct Parent {
    control: UnixStream,
    wants_end: watch::Receiver<bool>,
    serves: Arc<AtomicBool>,
}

impl Parent {
    /// The parent of this process and the socket that it listens on; `None` if it is no worker.
    ///
    /// # Errors
    /// If the process looks like a worker, but was not started as one.
    pub(crate) fn find() -> anyhow::Result<Option<(Self, TcpListener)>> {
        if std::env::var_os(WORKER).is_none() {
            return Ok(None);
        }
        let problem = format!("{WORKER} is set, but no supervisor started this process; unset it");
        let listener = TcpListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        listener.local_addr().context(problem.clone())?;
        let control = UnixStream::from(std::io::stdout().as_fd().try_clone_to_owned()?);
        control.peer_addr().context(problem)?;
        let (sender, wants_end) = watch::channel(false);
        let serves = Arc::new(AtomicBool::new(false));
        let (heard, is_served) = (control.try_clone()?, Arc::clone(&serves));
        std::thread::Builder::new().name("bcg-parent".into()).spawn(move || {
            if matches!((&heard).read(&mut [0]), Ok(1..)) {
                if !is_served.load(Ordering::Relaxed) {
                    exit(0); // nothing is lost before it serves
                }
                let _ = sender.send(true);
            }
            if !matches!((&heard).read(&mut [0]), Ok(1..)) {
                tracing::error!("the supervisor is gone: leaving at once");
                exit(1);
            }
        })?;
        Ok(Some((Self { control, wants_end, serves }, listener)))
    }

    /// Says that this worker serves.
    ///
    /// # Errors
    /// If the parent is gone.
    pub(crate) fn ready(&self) -> anyhow::Result<()> {
        self.serves.store(true, Ordering::Relaxed);
        writeln!(&self.control, "{READY}").context("the supervisor is gone")
    }

    /// Resolves when the parent wants this worker to end.
    pub(crate) async fn wants_end(mut self) {
        if self.wants_end.wait_for(|wanted| *wanted).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The parent's side of one worker.
struct Worker {
    child: Child,
    control: BufReader<tokio::net::UnixStream>,
}

impl Worker {
    fn start(listener: &TcpListener, restarts: usize) -> anyhow::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let program = std::env::current_exe().context("the path of this program is not known")?;
        let child = Command::new(program)
            .args(std::env::args_os().skip(1))
            .env(WORKER, restarts.to_string())
            .stdin(Stdio::from(OwnedFd::from(listener.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .kill_on_drop(true)
            .spawn()
            .context("no worker can be started")?;
        Ok(Self { child, control: BufReader::new(tokio::net::UnixStream::from_std(ours)?) })
    }

    /// Resolves when the worker serves, or with its status if it ended before.
    async fn is_ready(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        let Self { child, control } = self;
        let says_so = async {
            let mut line = String::new();
            while matches!(control.read_line(&mut line).await, Ok(1..)) {
                if line.trim_end() == READY {
                    return;
                }
                line.clear();
            }
            // It is ending, and its status says more.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = says_so => Ok(None),
            status = child.wait() => Ok(Some(status?)),
        }
    }

    /// Lets the worker finish what runs; kills it at the deadline.
    async fn stop(mut self, deadline: Duration) -> anyhow::Result<()> {
        // A worker that is gone needs no word.
        let _ = self.control.get_mut().write_all(END).await;
        match tokio::time::timeout(deadline + KILL_AFTER, self.child.wait()).await {
            Ok(status) => ensure!(status?.success(), "the worker did not end well"),
            Err(_) => {
                tracing::error!("the worker did not end in time: it is killed");
                self.child.kill().await?;
                bail!("the worker had to be killed");
            }
        }
        Ok(())
    }
}

/// Starts workers until it is told to end, or too many of them were lost.
///
/// # Errors
/// That the first worker did not start; that workers were lost `max_restarts` times within ten minutes.
pub(crate) fn run(args: &ServerArgs, http: &HttpOptions, listener: &TcpListener) -> anyhow::Result<()> {
    let shutdown = Shutdown::watch();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(supervise(args.max_restarts, http, listener, shutdown));
    runtime.shutdown_background();
    ended
}

async fn supervise(
    max_restarts: usize,
    http: &HttpOptions,
    listener: &TcpListener,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let mut asked = std::pin::pin!(shutdown.asked());
    let (mut restarts, mut recent, mut reason) = (0, VecDeque::new(), "the model is being loaded".to_owned());
    loop {
        let began = Instant::now();
        let pause = RESTART_PAUSE * u32::try_from(recent.len()).unwrap_or(u32::MAX).saturating_sub(1);
        // Dropped, and deaf, as soon as the worker serves.
        let mut stand_by =
            Box::pin(stand_by(listener, http, if restarts == 0 { "loading" } else { "restarting" }, reason));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            error = &mut stand_by => return error,
            () = &mut asked => return Ok(()),
        }
        let mut worker = Worker::start(listener, restarts)?;
        let ended = tokio::select! {
            ended = worker.is_ready() => ended?,
            error = &mut stand_by => return error,
            () = &mut asked => return worker.stop(http.shutdown_deadline).await,
        };
        drop(stand_by);
        let status = match ended {
            Some(status) if restarts == 0 => bail!("the worker ended before it served: {}", ending(status)),
            Some(status) => status,
            None => {
                tracing::info!(restarts, ms = began.elapsed().as_millis(), "the worker serves");
                tokio::select! {
                    status = worker.child.wait() => status?,
                    () = &mut asked => return worker.stop(http.shutdown_deadline).await,
                }
            }
        };
        if status.success() {
            return Ok(());
        }
        recent.push_back(Instant::now());
        recent.retain(|lost| lost.elapsed() < RESTART_WINDOW);
        ensure!(
            recent.len() <= max_restarts,
            "`max_restarts`: {} workers were lost within {} minutes, the last one by {}; the log says why",
            recent.len(),
            RESTART_WINDOW.as_secs() / 60,
            ending(status)
        );
        restarts += 1;
        reason = format!("the worker was lost ({}), and restart {restarts} is under way", ending(status));
        tracing::error!(restarts, "{reason}");
    }
}

/// Answers for the worker that is not there; returns with an error only.
async fn stand_by(
    listener: &TcpListener,
    http: &HttpOptions,
    status: &'static str,
    reason: String,
) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
    match bcg_server::stand_by(listener, http, status, reason).await? {}
}

/// How a worker ended.
fn ending(status: ExitStatus) -> String {
    status.to_string().replace(": ", " ")
}
