//! Derives `Freeze` and `Bridge`, field by field.
//!
//! The frozen form is a hidden tuple struct of the fields' frozen forms. It is `pub` inside a `const _`, so nobody can
//! name it and a public struct may have private field types (an associated type made of these would leak them, E0446).

use proc_macro2::{Ident, Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{
    DeriveInput, Field, Generics, Index, Member, Result, Type, WherePredicate, parse_quote, parse_quote_spanned,
};

use crate::check;

/// `#[derive(Freeze)]`.
pub(crate) fn freeze(input: &DeriveInput) -> Result<TokenStream> {
    let data = check::derive_input(input)?;
    let generics = bounded(&input.generics, data.fields.iter(), "Freeze");
    let (impl_generics, ty_generics, where_clause) = generics.split_for_impl();
    let name = &input.ident;
    let fields: Vec<_> = data.fields.iter().collect();
    let members: Vec<_> = data.fields.members().collect();
    let types = fields.iter().map(|field| {
        let ty = &field.ty;
        quote_spanned!(at(ty)=> <#ty as ::bcg_runtime::Freeze>::Frozen)
    });
    let freezes = fields.iter().zip(&members).map(|(field, member)| {
        let ty = &field.ty;
        quote_spanned!(at(ty)=> <#ty as ::bcg_runtime::Freeze>::freeze(&self.#member, __bcg_freezer)?)
    });
    let thaws = fields.iter().zip(&members).enumerate().map(|(i, (field, member))| {
        let (ty, i) = (&field.ty, Index::from(i));
        let value = quote_spanned!(at(ty)=> <#ty as ::bcg_runtime::Freeze>::thaw(&__bcg_frozen.#i, __bcg_thaw));
        quote!(#member: #value)
    });
    Ok(quote_spanned! {Span::mixed_site()=>
        #[doc(hidden)]
        #[allow(missing_debug_implementations, unreachable_pub, unused_qualifications, private_bounds, trivial_bounds, clippy::all, clippy::pedantic)]
        const _: () = {
            pub struct __BcgFrozen #impl_generics (#(#types,)*) #where_clause;

            #[automatically_derived]
            impl #impl_generics ::bcg_runtime::Freeze for #name #ty_generics #where_clause {
                type Frozen = __BcgFrozen #ty_generics;

                fn freeze(
                    &self,
                    __bcg_freezer: &mut ::bcg_runtime::Freezer<'_>,
                ) -> ::bcg_runtime::Result<Self::Frozen> {
                    ::core::result::Result::Ok(__BcgFrozen(#(#freezes,)*))
                }

                fn thaw(__bcg_frozen: &Self::Frozen, __bcg_thaw: &::bcg_runtime::Thaw<'_>) -> Self {
                    #name { #(#thaws,)* }
                }
            }
        };
    })
}

/// `#[derive(Bridge)]`.
pub(crate) fn bridge(input: &DeriveInput) -> Result<TokenStream> {
    let data = check::derive_input(input)?;
    let name = &input.ident;
    let generics = bounded(&input.generics, data.fields.iter(), "Bridge");
    let (impl_generics, ty_generics, where_clause) = generics.split_for_impl();
    let carries = data.fields.iter().zip(data.fields.members()).enumerate().map(|(i, (field, member))| {
        let (ty, i) = (&field.ty, Index::from(i));
        let carry = quote_spanned!(at(ty)=> <#ty as ::bcg_runtime::Bridge>::carry);
        // An error tells the path to the part of the output that differs.
        let (enter, step) = match &member {
            Member::Named(name) => (quote!(field), name.to_string().into_token_stream()),
            Member::Unnamed(index) => (quote!(index), (index.index as usize).into_token_stream()),
        };
        quote_spanned! {Span::mixed_site()=>
            __bcg_carrier.#enter(#step, |__bcg_carrier| #carry(&self.#member, &__bcg_frozen.#i, __bcg_carrier))?;
        }
    });
    Ok(quote_spanned! {Span::mixed_site()=>
        #[automatically_derived]
        #[allow(unused_qualifications, trivial_bounds)]
        impl #impl_generics ::bcg_runtime::Bridge for #name #ty_generics #where_clause {
            fn carry(
                &self,
                __bcg_frozen: &<Self as ::bcg_runtime::Freeze>::Frozen,
                __bcg_carrier: &mut ::bcg_runtime::Carrier<'_>,
            ) -> ::bcg_runtime::Result<()> {
                #(#carries)*
                ::core::result::Result::Ok(())
            }
        }
    })
}

/// The span of `ty`, for code that a missing bound of it must point at.
fn at(ty: &Type) -> Span {
    ty.span().resolved_at(Span::mixed_site())
}

/// `generics` with `Type: Trait` for each field: the one place where a field that lacks the trait is reported. Type
/// parameters are `'static`, because the hidden struct has them too.
fn bounded<'f>(generics: &Generics, fields: impl Iterator<Item = &'f Field>, bound: &str) -> Generics {
    let mut bounded = generics.clone();
    let params: Vec<Ident> = generics.type_params().map(|param| param.ident.clone()).collect();
    let predicates = &mut bounded.make_where_clause().predicates;
    predicates.extend(params.iter().map(|param| -> WherePredicate { parse_quote!(#param: 'static) }));
    for Field { ty, .. } in fields {
        let bound = Ident::new(bound, ty.span());
        predicates.push(parse_quote_spanned!(ty.span()=> #ty: ::bcg_runtime::#bound));
    }
    bounded
}
