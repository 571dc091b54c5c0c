//! A request that was let in, and the work of reading it: off the async threads, bounded in number and in bytes.
//!
//! Parsing a body, rendering a conversation and turning text into tokens take processor time and several times the memory
//! of the body. So half the cores do it, one request each; others wait with nothing but their bytes. `/health` and what
//! runs already never wait for them.

use std::num::NonZero;
use std::sync::Arc;
use std::thread::available_parallelism;

use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use bcg_engine::{ClientId, EventStream, FairPlaces, GenerationRequest, Place, Prompt, Submission};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use crate::answers::Answers;
use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::request::check_logprobs;
use crate::{App, trace};

/// The most requests that are read at once, however many cores there are: each may take tens of MiB.
const READERS_MAX: usize = 16;
/// The most requests that wait to be read; one more is a 429.
const WAITING_MAX: usize = 256;
/// The most requests whose grammars are compiled, or wait for it; one more is a 429.
const COMPILING_MAX: usize = 64;

/// A request that was let in.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) body: Bytes,
    pub(crate) admitted: Admitted,
}

/// What the front door knows of a request that it let in.
#[derive(Debug, Clone)]
pub(crate) struct Admitted {
    pub(crate) client: ClientId,
    /// Its bytes among those of all bodies; dropped when nothing of the body is held any more.
    pub(crate) bytes: Arc<Place>,
}

impl FromRequest<App> for Incoming {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &App) -> Result<Self, ApiError> {
        let (mut head, body) = request.into_parts();
        let Some(admitted) = head.extensions.remove::<Admitted>() else {
            return Err(ApiError::Engine("the request did not pass the front door".into()));
        };
        // The front door has read it and has put it back whole.
        let body = to_bytes(body, usize::MAX).await;
        let body = body.map_err(|error| ApiError::bad_body(format!("The body could not be read: {error}.")))?;
        Ok(Self { body, admitted })
    }
}

/// What a body asks of the engine.
#[derive(Debug)]
pub(crate) struct Asked {
    /// One for each prompt.
    pub(crate) requests: Vec<GenerationRequest>,
    /// Answers to each.
    pub(crate) n: usize,
    pub(crate) priority: i32,
}

/// The threads that read requests. Clones are the same threads.
#[derive(Debug, Clone)]
pub(crate) struct Readers {
    threads: Arc<Semaphore>,
    waiting: FairPlaces,
    compiling: FairPlaces,
}

impl Default for Readers {
    /// Half the cores, at least one.
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, NonZero::get);
        Self::new(cores.div_ceil(2).min(READERS_MAX), WAITING_MAX)
    }
}

impl Readers {
    fn new(threads: usize, waiting: usize) -> Self {
        Self {
            threads: Arc::new(Semaphore::new(threads)),
            waiting: FairPlaces::new(waiting),
            compiling: FairPlaces::new(COMPILING_MAX),
        }
    }

    /// Does something off the async threads, once it is its turn. What it holds is dropped there too.
    async fn run<T: Send + 'static>(
        &self,
        client: &ClientId,
        job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let place = self.waiting.try_take(client, 1).ok_or(ApiError::Busy { limit: WAITING_MAX })?;
        let turn = self.threads.clone().acquire_owned().await;
        blocking(move || {
            let _held = (place, turn);
            job()
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = spawn_blocking(job).await;
    done.unwrap_or_else(|error| Err(ApiError::Engine(format!("reading the request failed: {error}"))))
}

/// What has become of a request once it is read.
enum Read {
    Running(Vec<EventStream>),
    /// Its grammar takes a while, which must not keep others from being read.
    Compiles(Submission),
}

impl App {
    /// Reads a request and answers it, without the engine's worker.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        incoming: Incoming,
        read: impl FnOnce(&Self, &BodyFields) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (app, client) = (self.clone(), incoming.admitted.client.clone());
        self.readers.run(&client, move || read(&app, &BodyFields::parse(&incoming.body)?)).await
    }

    /// Reads what a request asks of the engine and submits it, all of its answers or none.
    pub(crate) async fn generate<T: Send + 'static>(
        &self,
        incoming: Incoming,
        read: impl FnOnce(&Self, &BodyFields) -> Result<(Asked, T), ApiError> + Send + 'static,
    ) -> Result<(Answers, T), ApiError> {
        let cancelled = CancellationToken::new();
        // Dropped with this future, when the client leaves.
        let _cancels = cancelled.clone().drop_guard();
        let Incoming { body, admitted: Admitted { client, bytes } } = incoming;
        let (app, held) = (self.clone(), bytes.clone());
        let job = {
            let client = client.clone();
            move || {
                if cancelled.is_cancelled() {
                    return Err(ApiError::ClientLeft);
                }
                let _held = held;
                let (asked, rest) = read(&app, &BodyFields::parse(&body)?)?;
                drop(body);
                let Asked { requests, n, priority } = asked;
                check_logprobs(&requests, n, app.engine.info().context_length)?;
                let submission = Submission { requests, n, client, priority, cancelled };
                Ok((app.submit_or_defer(submission)?, rest))
            }
        };
        let (read, rest) = self.readers.run(&client, job).await?;
        let streams = match read {
            Read::Running(streams) => streams,
            Read::Compiles(submission) => {
                let place = self.readers.compiling.try_take(&client, 1).ok_or(ApiError::CompilersBusy)?;
                let engine = self.engine.clone();
                blocking(move || {
                    let _held = (place, bytes);
                    Ok(engine.submit_all(submission)?)
                })
                .await?
            }
        };
        Ok((Answers::new(streams.into_iter().map(trace::watched).collect()), rest))
    }

    fn submit_or_defer(&self, mut submission: Submission) -> Result<Read, ApiError> {
        if submission.requests.iter().all(|request| request.grammar.is_none()) {
            return Ok(Read::Running(self.engine.submit_all(submission)?));
        }
        for request in &mut submission.requests {
            let prompt = std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()));
            request.prompt = Prompt::Tokens(self.engine.prompt_tokens(prompt)?);
        }
        Ok(Read::Compiles(submission))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn requests_take_turns_and_a_number_of_them_waits() {
        let readers = Readers::new(1, 3);
        let [one, two] = ["one", "two"].map(ClientId::new);
        let (go, waits) = channel::<()>();
        let mut first = Box::pin(readers.run(&one, move || Ok(waits.recv().is_ok())));
        assert!((&mut first).now_or_never().is_none());
        let mut second = Box::pin(readers.run(&one, || Ok(())));
        let mut third = Box::pin(readers.run(&two, || Ok(())));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        // The limit that a client reads is that of the server.
        assert_eq!(readers.run(&two, || Ok(())).await, Err(ApiError::Busy { limit: WAITING_MAX }));
        drop(third);
        assert_eq!(readers.waiting.free(), 1, "who leaves makes room");
        go.send(()).expect("the first runs");
        assert_eq!((first.await, second.await), (Ok(true), Ok(())));
        assert_eq!((readers.waiting.free(), readers.threads.available_permits()), (3, 1));
    }
}
