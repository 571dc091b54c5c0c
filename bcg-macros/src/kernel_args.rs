//! Derives `KernelArgs`: the description of the C struct, and the proof of the layout that its `unsafe impl` needs.
//!
//! The proof has three parts, and the compiler checks each of them:
//! - `#[repr(C)]` without parameters, which [`check`] demands, fixes the order of the fields;
//! - each field's type implements `ArgValue`: all bytes of such a value are initialised and of a type that CUDA has;
//! - constant assertions: each field begins where the field before it ends, and the struct ends with its last field, so no
//!   byte is padding.

use proc_macro2::{Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{DeriveInput, Result};

use crate::check::{self, ArgField, say};

/// `#[derive(KernelArgs)]`.
pub(crate) fn kernel_args(input: &DeriveInput) -> Result<TokenStream> {
    let fields = check::kernel_args(input)?;
    let name = &input.ident;
    let c_name = name.unraw().to_string();
    let described = fields.iter().map(|field| describe(input, field));
    let asserted = assertions(input, &fields);
    Ok(quote_spanned! {Span::mixed_site()=>
        const _: () = {
            #asserted
        };

        #[automatically_derived]
        #[allow(unused_qualifications)]
        unsafe impl ::bcg_runtime::ArgValue for #name {
            const TYPE: ::bcg_runtime::ArgType =
                ::bcg_runtime::ArgType::of_struct(<Self as ::bcg_runtime::KernelArgs>::STRUCT);
        }

        #[automatically_derived]
        #[allow(unused_qualifications)]
        unsafe impl ::bcg_runtime::KernelArgs for #name {
            const STRUCT: &'static ::bcg_runtime::ArgStruct = &::bcg_runtime::ArgStruct {
                name: #c_name,
                bytes: ::core::mem::size_of::<Self>(),
                fields: &[#(#described),*],
            };
        }
    })
}

/// One field of the C struct.
fn describe(input: &DeriveInput, field: &ArgField) -> TokenStream {
    let (name, ArgField { ident, ty, .. }) = (&input.ident, field);
    let c_name = ident.unraw().to_string();
    let mut c_type = quote_spanned!(located(ty)=> <#ty as ::bcg_runtime::ArgValue>::TYPE);
    if let Some(pointee) = &field.pointee {
        let (is_const, to) = (pointee.is_const, pointee.to.to_string());
        c_type = quote!(#c_type.pointing_to(#is_const, #to));
    }
    quote_spanned! {Span::mixed_site()=>
        ::bcg_runtime::ArgField { name: #c_name, ty: #c_type, offset: ::core::mem::offset_of!(#name, #ident) }
    }
}

/// What must hold of the layout, each placed at the field, or at the struct, that breaks it.
fn assertions(input: &DeriveInput, fields: &[ArgField]) -> TokenStream {
    let name = &input.ident;
    let begin = |field: &ArgField| {
        let ident = &field.ident;
        quote!(::core::mem::offset_of!(#name, #ident))
    };
    let end = |field: &ArgField| {
        let (begin, ty) = (begin(field), &field.ty);
        quote!(#begin + ::core::mem::size_of::<#ty>())
    };
    let before = fields.windows(2).map(|pair| {
        let (end, begin, message) = (end(&pair[0]), begin(&pair[1]), say::PADDING_BEFORE);
        quote_spanned!(located(&pair[1].ident)=> ::core::assert!(#begin == #end, #message);)
    });
    let after = fields.last().map(|last| {
        let (end, message) = (end(last), say::PADDING_AFTER);
        quote_spanned!(located(&last.ident)=> ::core::assert!(::core::mem::size_of::<#name>() == #end, #message);)
    });
    let message = say::ARGS_TOO_LARGE;
    let size = quote_spanned! {located(name)=>
        ::core::assert!(::core::mem::size_of::<#name>() <= ::bcg_runtime::ARG_BYTES_MAX, #message);
    };
    quote!(#(#before)* #after #size)
}

/// The span of `guilty`, for code that the compiler must point at it for.
fn located(guilty: &impl Spanned) -> Span {
    guilty.span().resolved_at(Span::mixed_site())
}
