//! The attribute and the derives of `bcg-runtime`.
#![forbid(unsafe_code)]

mod args;
mod check;
mod expand;
mod freeze;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Makes a function an eager break.
#[proc_macro_attribute]
pub fn eager_on_graph(options: TokenStream, item: TokenStream) -> TokenStream {
    expand::attribute(options.into(), item.into()).into()
}

/// Derives `Freeze`
#[proc_macro_derive(Freeze)]
pub fn derive_freeze(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    freeze::freeze(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Derives `Bridge`
#[proc_macro_derive(Bridge)]
pub fn derive_bridge(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    freeze::bridge(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}
