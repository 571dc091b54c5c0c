//! What can be a kernel's argument struct, as far as the words alone tell.

use proc_macro2::Ident;
use syn::parse::{Parse, ParseStream};
use syn::{Attribute, Data, DataStruct, DeriveInput, Fields, Meta, Token, Type, TypePath};

use super::{Errors, say, unparenthesized};

/// A field of an argument struct.
pub(crate) struct ArgField {
    pub(crate) ident: Ident,
    pub(crate) ty: Type,
    /// What `#[points_to(…)]` says.
    pub(crate) pointee: Option<Pointee>,
}

/// `const T`, or `T`: what an address leads to.
pub(crate) struct Pointee {
    pub(crate) is_const: bool,
    pub(crate) to: Ident,
}

impl Parse for Pointee {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let is_const = input.parse::<Option<Token![const]>>()?.is_some();
        Ok(Self { is_const, to: input.parse()? })
    }
}

/// Checks the input of `#[derive(KernelArgs)]`.
pub(crate) fn kernel_args(input: &DeriveInput) -> syn::Result<Vec<ArgField>> {
    let data = match &input.data {
        Data::Struct(data) => data,
        Data::Enum(data) => return Err(say::args_on_enum(data.enum_token)),
        Data::Union(data) => return Err(say::args_on_union(data.union_token)),
    };
    let mut errors = Errors::default();
    check_repr(input, &mut errors);
    if !input.generics.params.is_empty() {
        errors.push(say::args_generic(&input.generics));
    }
    for attr in input.attrs.iter().filter(|attr| is_points_to(attr)) {
        errors.push(say::points_to_no_address(attr));
    }
    let fields = check_fields(input, data, &mut errors);
    errors.0.map_or(Ok(fields), Err)
}

fn check_repr(input: &DeriveInput, errors: &mut Errors) {
    let mut is_repr_c = false;
    for attr in input.attrs.iter().filter(|attr| attr.path().is_ident("repr")) {
        match &attr.meta {
            Meta::List(list) if list.tokens.to_string() == "C" => is_repr_c = true,
            _ => return errors.push(say::args_other_repr(attr)),
        }
    }
    if !is_repr_c {
        errors.push(say::args_without_repr_c(&input.ident));
    }
}

fn check_fields(input: &DeriveInput, data: &DataStruct, errors: &mut Errors) -> Vec<ArgField> {
    let named = match &data.fields {
        Fields::Named(fields) if !fields.named.is_empty() => &fields.named,
        _ => {
            errors.push(say::args_without_names(&input.ident));
            return Vec::new();
        }
    };
    let mut fields = Vec::new();
    for field in named {
        let Some(ident) = field.ident.clone() else { continue };
        let checked = check_type(&field.ty).and_then(|()| pointee(&field.attrs, &field.ty));
        if let Some(pointee) = errors.keep(checked) {
            fields.push(ArgField { ident, ty: field.ty.clone(), pointee });
        }
    }
    fields
}

/// Refuses the types that no argument can have. Where the name alone cannot tell, the compiler looks for `ArgValue`.
fn check_type(ty: &Type) -> syn::Result<()> {
    const OTHERS: [&str; 8] = ["char", "str", "i128", "u128", "Box", "Option", "String", "Vec"];
    match unparenthesized(ty) {
        Type::Array(array) => check_type(&array.elem),
        Type::Reference(_) | Type::Ptr(_) => Err(say::args_reference(ty)),
        Type::Path(TypePath { path, .. }) => {
            let Some(last) = path.segments.last() else { return Ok(()) };
            match last.ident.to_string().as_str() {
                "bool" => Err(say::args_bool(ty)),
                "usize" | "isize" => Err(say::args_usize(ty)),
                name if OTHERS.contains(&name) => Err(say::args_other_type(ty)),
                _ => Ok(()),
            }
        }
        Type::Macro(_) => Ok(()),
        _ => Err(say::args_other_type(ty)),
    }
}

fn pointee(attrs: &[Attribute], ty: &Type) -> syn::Result<Option<Pointee>> {
    let mut attrs = attrs.iter().filter(|attr| is_points_to(attr));
    let Some(attr) = attrs.next() else { return Ok(None) };
    if let Some(second) = attrs.next() {
        return Err(say::points_to_twice(second));
    }
    if !is_address(ty) {
        return Err(say::points_to_no_address(attr));
    }
    attr.parse_args().map(Some).map_err(|_| say::points_to_syntax(attr))
}

fn is_points_to(attr: &Attribute) -> bool {
    attr.path().is_ident("points_to")
}

/// Whether `ty` is `DevicePtr`, or an array of it.
fn is_address(ty: &Type) -> bool {
    match unparenthesized(ty) {
        Type::Array(array) => is_address(&array.elem),
        ty => super::is_named(ty, "DevicePtr"),
    }
}
