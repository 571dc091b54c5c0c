//! The entry points of one of NVIDIA's libraries that is loaded at run time, as one struct.

/// Declares a struct with a field for each entry point, and how it is taken from a library that was opened.
///
/// Each use is a promise that the signatures are those of the library's header, and names that header.
macro_rules! bindings {
    ($(#[$doc:meta])* $vis:vis struct $name:ident; $($symbol:ident($($arg:ty),*) -> $out:ty;)*) => {
        $(#[$doc])*
        #[allow(non_snake_case)] // the fields carry the library's own names
        $vis struct $name {
            $($symbol: unsafe extern "C" fn($($arg),*) -> $out,)*
            // Keeps the functions above mapped; lives in a static, so it is never unloaded.
            _library: libloading::Library,
        }

        impl $name {
            fn bind(library: libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($symbol: {
                        // SAFETY: the signature is that of the symbol in the header that the use of this macro names. The
                        // copied pointer stays valid because `_library` lives as long as it does.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($arg),*) -> $out>(concat!(stringify!($symbol), "\0").as_bytes())
                        };
                        *found.map_err(|_| concat!("it has no ", stringify!($symbol)))?
                    },)*
                    _library: library,
                })
            }
        }
    };
}

pub(super) use bindings;
