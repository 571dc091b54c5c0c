//! HTTPS: the server's certificate and key. Without the feature `tls`, options that ask for it are refused.

#[cfg(feature = "tls")]
pub(crate) use with_tls::{Acceptor, acceptor};
#[cfg(not(feature = "tls"))]
pub(crate) use without_tls::{Acceptor, acceptor};

#[cfg(feature = "tls")]
mod with_tls {
    use std::path::Path;
    use std::sync::Arc;

    use bcg_engine::OptionError;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

    use crate::{HttpError, HttpOptions};

    pub(crate) type Acceptor = tokio_rustls::TlsAcceptor;

    /// Reads certificate and key, if they are given, and checks that they belong together.
    ///
    /// # Errors
    /// Names the option, the file and what is wrong with it.
    pub(crate) fn acceptor(options: &HttpOptions) -> Result<Option<Acceptor>, HttpError> {
        let missing = |option| Err(OptionError::new(option, "is missing", "give certificate and key together").into());
        match (&options.tls_cert, &options.tls_key) {
            (None, None) => Ok(None),
            (Some(_), None) => missing("tls_key"),
            (None, Some(_)) => missing("tls_cert"),
            (Some(cert), Some(key)) => Ok(Some(config(cert, key)?.into())),
        }
    }

    fn config(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, HttpError> {
        let refused = |error| HttpError::value("tls_cert", cert.display().to_string(), error);
        let chain = CertificateDer::pem_file_iter(cert).map_err(|error| refused(error.into()))?;
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|error| refused(error.into()))?;
        if chain.is_empty() {
            return Err(refused("holds no certificate; give a PEM file, the server's certificate first".into()));
        }
        let read = PrivateKeyDer::from_pem_file(key).map_err(|error| {
            let problem = format!("{}: give a PEM file with an unencrypted private key", key.display());
            HttpError::value("tls_key", problem, error.into())
        })?;
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, read);
        let mut config = config.map_err(|error| {
            let problem = format!("{} and `tls_key` {} do not go together", cert.display(), key.display());
            HttpError::value("tls_cert", problem, error.into())
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

#[cfg(not(feature = "tls"))]
mod without_tls {
    use std::io;

    use bcg_engine::OptionError;

    use crate::{HttpError, HttpOptions};

    /// None is ever made.
    #[derive(Clone)]
    pub(crate) enum Acceptor {}

    impl Acceptor {
        pub(crate) async fn accept<S>(&self, _: S) -> io::Result<S> {
            match *self {}
        }
    }

    /// Refuses certificate and key.
    ///
    /// # Errors
    /// [`OptionError`] if one is given.
    pub(crate) fn acceptor(options: &HttpOptions) -> Result<Option<Acceptor>, HttpError> {
        let given = [("tls_cert", &options.tls_cert), ("tls_key", &options.tls_key)];
        match given.into_iter().find(|(_, file)| file.is_some()) {
            Some((option, _)) => {
                let remedy = "build it with its feature tls, or drop this option";
                Err(OptionError::new(option, "this program was built without TLS", remedy).into())
            }
            None => Ok(None),
        }
    }
}
