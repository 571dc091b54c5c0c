//! A client of HTTP/1.1 that keeps its connection, checks every answer to the last byte, and may leave at any moment.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::calls::{Call, Expect, Leave};
use super::life::CERT;

/// Longer than any answer takes; a call without an end fails the soak instead of stopping it.
const PATIENCE: Duration = Duration::from_secs(60);

/// The one end of a call, as its client saw it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum End {
    /// A whole answer: the text of each choice.
    Answered(Vec<String>),
    /// The request was wrong, and the server said so as expected.
    Refused,
    /// The server was full, and said so this long after the request.
    Overloaded(Duration),
    /// The engine failed while it worked on the request, and said why.
    Failed(String),
    /// The server takes nothing new.
    Unavailable,
    /// The client did not wait for the end.
    Left,
}

/// A response as it came.
struct Response {
    status: u16,
    head: String,
    body: String,
    waited: Duration,
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// A connection, over TLS or not.
type Connection = BufReader<Box<dyn Duplex>>;

/// One connection at a time.
pub(crate) struct Client {
    address: SocketAddr,
    tls: Option<TlsConnector>,
    connection: Option<Connection>,
}

impl Client {
    pub(crate) fn new(address: SocketAddr, is_tls: bool) -> Self {
        Self { address, tls: is_tls.then(connector), connection: None }
    }

    /// Makes a call and returns its end; an error says what was wrong with it.
    pub(crate) async fn call(&mut self, call: &Call) -> Result<End, String> {
        if call.is_new_connection {
            self.connection = None;
        }
        let response = match call.leave {
            None => self.exchange(call).await?,
            Some(Leave::Within(bytes)) => {
                let mut connection = self.connect().await?;
                let request = call.request();
                let _ = connection.write_all(&request.as_bytes()[..bytes.min(request.len() - 1)]).await;
                return Ok(End::Left);
            }
            Some(Leave::After(pause)) => {
                let exchange = tokio::select! {
                    response = self.exchange(call) => Some(response),
                    () = sleep(pause) => None,
                };
                let Some(response) = exchange else {
                    self.connection = None;
                    return Ok(End::Left);
                };
                response?
            }
        };
        end(&call.expect, &response)
            .map_err(|error| format!("{error}: {call:?}: {} {}", response.status, response.body))
    }

    async fn connect(&mut self) -> Result<Connection, String> {
        if let Some(connection) = self.connection.take() {
            return Ok(connection);
        }
        let stream = TcpStream::connect(self.address).await.map_err(|error| format!("no connection: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let Some(tls) = &self.tls else { return Ok(BufReader::new(Box::new(stream))) };
        let name = ServerName::try_from("localhost").expect("a name");
        let stream = tls.connect(name, stream).await.map_err(|error| format!("no TLS: {error}"))?;
        Ok(BufReader::new(Box::new(stream)))
    }

    async fn exchange(&mut self, call: &Call) -> Result<Response, String> {
        let is_kept = self.connection.is_some();
        let mut connection = self.connect().await?;
        let response = match timeout(PATIENCE, read(&mut connection, call)).await {
            Err(_) => return Err(format!("no end within {PATIENCE:?}: {call:?}")),
            // A server may close a connection that idles; the client finds out when it uses it.
            Ok(Err(_)) if is_kept => {
                connection = self.connect().await?;
                let read = timeout(PATIENCE, read(&mut connection, call)).await;
                read.map_err(|_| format!("no end within {PATIENCE:?}: {call:?}"))?
            }
            Ok(response) => response,
        };
        let response = response.map_err(|error| format!("{error}: {call:?}"))?;
        if !response.head.contains("connection: close") {
            self.connection = Some(connection);
        }
        Ok(response)
    }
}

/// Trusts the server's own certificate.
fn connector() -> TlsConnector {
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_file(CERT).expect("the certificate of the tests");
    roots.add(certificate).expect("a root");
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

async fn read(connection: &mut Connection, call: &Call) -> Result<Response, String> {
    let broken = |error: std::io::Error| format!("the connection broke: {error}");
    connection.write_all(call.request().as_bytes()).await.map_err(broken)?;
    let asked = Instant::now();
    let status = line(connection).await?;
    let waited = asked.elapsed();
    let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("no status line")?;
    let mut head = String::new();
    while !head.ends_with("\n\r\n") && head != "\r\n" {
        head += &line(connection).await?.to_ascii_lowercase();
    }
    let mut body = Vec::new();
    let pause = Duration::from_millis(if call.reads_slowly { 5 } else { 0 });
    sleep(pause).await;
    match head.lines().find_map(|line| line.strip_prefix("content-length: ")) {
        Some(length) => {
            body.resize(length.parse().map_err(|_| "no length")?, 0);
            connection.read_exact(&mut body).await.map_err(broken)?;
        }
        None => loop {
            sleep(pause).await;
            let size = usize::from_str_radix(line(connection).await?.trim(), 16).map_err(|_| "no chunk size")?;
            let from = body.len();
            body.resize(from + size + 2, 0);
            connection.read_exact(&mut body[from..]).await.map_err(broken)?;
            body.truncate(from + size);
            if size == 0 {
                break;
            }
        },
    }
    let body = String::from_utf8(body).map_err(|_| "no UTF-8")?;
    Ok(Response { status, head, body, waited })
}

async fn line(connection: &mut Connection) -> Result<String, String> {
    let mut line = String::new();
    match connection.read_line(&mut line).await {
        Ok(0) => Err("the connection ended".into()),
        Ok(_) => Ok(line),
        Err(error) => Err(format!("the connection broke: {error}")),
    }
}

/// Says how the call ended, or what is wrong with the response.
fn end(expect: &Expect, response: &Response) -> Result<End, String> {
    let error = || -> Result<String, String> {
        let body: Value = serde_json::from_str(&response.body).map_err(|_| "no JSON")?;
        let message = body["error"]["message"].as_str().filter(|message| !message.is_empty());
        Ok(message.ok_or("an error without a message")?.to_owned())
    };
    match (response.status, expect) {
        (429, _) => error().map(|_| End::Overloaded(response.waited)),
        (503, _) => error().map(|_| End::Unavailable),
        (status, Expect::Refusal(expected)) if status == *expected => error().map(|_| End::Refused),
        (500, Expect::Answer { .. }) => error().map(End::Failed),
        (200, Expect::Answer { stream, num_choices, .. }) => {
            let choices = if *stream { frames(&response.body)? } else { whole(&response.body)? };
            match choices {
                Err(message) => Ok(End::Failed(message)),
                Ok(choices) if choices.len() == *num_choices => Ok(End::Answered(choices)),
                Ok(choices) => Err(format!("{} choices, not {num_choices}", choices.len())),
            }
        }
        _ => Err("an unexpected status".into()),
    }
}

/// The text of each choice, or the error that the server tells.
type Choices = Result<Vec<String>, String>;

fn whole(body: &str) -> Result<Choices, String> {
    let body: Value = serde_json::from_str(body).map_err(|_| "no JSON")?;
    let choices = body["choices"].as_array().ok_or("no choices")?;
    let mut texts = Vec::new();
    for (index, choice) in choices.iter().enumerate() {
        if choice["index"] != index || !choice["finish_reason"].is_string() {
            return Err(format!("choice {index} is not complete"));
        }
        let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
        texts.push(text.ok_or("no text")?.to_owned());
    }
    if body["usage"]["completion_tokens"].as_u64().is_none_or(|tokens| tokens < texts.len() as u64) {
        return Err("no usage".into());
    }
    Ok(Ok(texts))
}

/// Reads a stream: every choice ends exactly once, nothing of it comes after, and `[DONE]` is the last frame.
fn frames(body: &str) -> Result<Choices, String> {
    let body = body.strip_suffix("data: [DONE]\n\n").ok_or("[DONE] does not come last")?;
    let mut choices: BTreeMap<u64, (String, bool)> = BTreeMap::new();
    let mut failed = None;
    for frame in body.split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':')) {
        let frame: Value =
            frame.strip_prefix("data: ").and_then(|frame| serde_json::from_str(frame).ok()).ok_or("no frame")?;
        if failed.is_some() {
            return Err("a frame after the error".into());
        }
        if let Some(message) = frame["error"]["message"].as_str() {
            failed = Some(message.to_owned());
            continue;
        }
        for choice in frame["choices"].as_array().ok_or("no choices")? {
            let (text, is_done) = choices.entry(choice["index"].as_u64().ok_or("no index")?).or_default();
            if *is_done {
                return Err("a choice goes on after its end".into());
            }
            *text += choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
            *is_done = choice["finish_reason"].is_string();
        }
    }
    if let Some(message) = failed {
        return Ok(Err(message));
    }
    if choices.keys().copied().ne(0..choices.len() as u64) || choices.values().any(|(_, is_done)| !is_done) {
        return Err("a choice is not complete".into());
    }
    Ok(Ok(choices.into_values().map(|(text, _)| text).collect()))
}
