//! The server's certificate and key.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Reads both files and checks that they belong together.
///
/// # Errors
/// Names the flag, the file and what is wrong with it.
pub(super) fn config(cert: &Path, key: &Path) -> anyhow::Result<Arc<ServerConfig>> {
    let cert_flag = || format!("--tls-cert {}", cert.display());
    let key_flag = || format!("--tls-key {}", key.display());
    let chain = CertificateDer::pem_file_iter(cert).with_context(cert_flag)?;
    let chain = chain.collect::<Result<Vec<_>, _>>().with_context(cert_flag)?;
    ensure!(
        !chain.is_empty(),
        "{}: holds no certificate; give a PEM file, the server's certificate first",
        cert_flag()
    );
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("{}: give a PEM file with an unencrypted private key", key_flag()))?;
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key);
    let mut config = config.with_context(|| format!("{} and {} do not go together", cert_flag(), key_flag()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
