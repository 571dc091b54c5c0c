//! Decides what can be annotated or derived, and holds every diagnostic of the crate.
//!
//! Invariants:
//! - Each message is one function of [`say`], points at the guilty token, and says what is wrong and what to do.
//! - Each message has one case of the same name in `tests/ui/fail`; `tests/tidy.rs` compares the two lists.
//! - All errors of one signature are reported together.
//!
//! What a macro cannot know, such as whether an argument's type implements `Freeze`, is left to the compiler:
//! [`expand`](crate::expand) places each such bound at the type that must meet it.

mod kernel_args;

use proc_macro2::{Ident, Span, TokenStream};
use quote::ToTokens;
use syn::spanned::Spanned;
use syn::visit_mut::{self, VisitMut};
use syn::{
    Attribute, Data, DataStruct, DeriveInput, Error, FnArg, GenericArgument, GenericParam, Generics, Lifetime, Pat,
    PatType, Path, PathArguments, Receiver, ReceiverKind, ReturnType, Safety, Signature, Token, Type, TypePath,
    TypeReference,
};

pub(crate) use kernel_args::{ArgField, kernel_args};

/// Every message, by name.
pub(crate) mod say {
    use quote::ToTokens;
    use syn::Error;

    macro_rules! messages {
        ($($name:ident: $text:literal;)*) => {
            $(pub(crate) fn $name(guilty: impl ToTokens) -> Error {
                Error::new_spanned(guilty, $text)
            })*
        };
    }

    messages! {
        // The item
        not_a_function: "`#[eager_on_graph]` breaks a graph where a function is called: put it on a function or a method";
        no_body: "a declaration has nothing to run: write `&mut Context<'_, L>` here, and put `#[eager_on_graph]` on the methods that implement it";
        async_fn: "an eager break runs to its end before the next segment starts, so it cannot be `async`: remove `async`, and wait inside the break with a blocking call";
        const_fn: "an eager break runs on the device's host, never at compile time: remove `const`";
        unsafe_fn: "replay calls a break by itself and cannot keep an unsafe promise: remove `unsafe`, and put an `unsafe` block with its proof in the body";
        extern_fn: "a break has the Rust calling convention: remove `extern`";
        variadic: "the arguments of a break are frozen one by one, so their number is fixed: take a `Vec<T>` instead of `...`";
        lifetime_param: "a break outlives the call that captured it, so it cannot borrow from its caller for a named lifetime: elide the lifetime, or own the data with `Arc<T>`";

        // The receiver
        self_by_value: "replay runs a break many times, so `self` cannot be consumed: use `self: &Arc<Self>`, or `&self` where `Self: Freeze`";
        self_mut: "replay cannot borrow `self` mutably: use `self: &Arc<Self>`, and keep what changes in the live batch (`cx.live()`) or behind a lock";
        self_other: "a break holds its receiver by `Arc` or freezes it: use `self: &Arc<Self>`, or `&self` where `Self: Freeze`";

        // The first parameter
        eager_missing: "a break needs a context to run in: make the first parameter `cx: &mut Eager<'_, L>`, where `L` is the live batch";
        eager_wrong_type: "the first parameter of a break is `cx: &mut Eager<'_, L>`, where `L` is the live batch";
        eager_not_first: "`&mut Eager<'_, L>` comes before every other argument, and once: move it to the first place";
        eager_is_context: "a break takes `&mut Eager<'_, L>`; `#[eager_on_graph]` makes the function for callers, which takes `&mut Context<'_, L>`";
        eager_not_mut: "a break launches work, so it takes its context as `&mut Eager<'_, L>`";
        eager_without_live: "the live batch is missing: write `&mut Eager<'_, L>`, or `&mut Eager<'_, ()>` where the break reads none";

        // The other parameters
        mut_ref_argument: "an argument is frozen at capture, so a break cannot write through `&mut`: return the new value, or write in place into a `&Tensor`";
        slice_argument: "a borrowed slice does not live until replay: take a `Vec<T>`, or `&Arc<[T]>` for many elements";
        str_argument: "a borrowed string does not live until replay: take `&Arc<str>`, or `&'static str` for a literal";
        dyn_argument: "a borrowed trait object does not live until replay: take `&Arc<dyn Trait>`, with `Trait: Send + Sync`";
        borrowed_argument: "this argument holds a borrow that does not live until replay: own the data with `Arc<T>`, or take a plain `&T` of a type that implements `Freeze`";
        impl_trait_argument: "the argument's type must have a name to be frozen by: write `fn name<T: Trait + Freeze>(…, x: &T)` instead of `impl Trait`";
        pattern_argument: "an argument of a break needs a plain name: take it by name, and match it in the body";
        cfg_argument: "the arguments of a break cannot depend on `cfg`: put the `cfg` on the whole function, once per case";

        // The return type
        no_return: "a break returns what crosses into the next segment, or the error that ends the replay: add `-> Result<()>`";
        return_not_result: "a break can fail, at capture and at replay: return `Result<R>`, where `R: Bridge`";
        returned_borrow: "a break's output is kept by the graph, so it cannot be borrowed: return it by value (cloning a `Tensor` copies no data)";

        // The options
        unknown_option: "expected `enable = true`, `enable = false`, `stub = path` or `rank_coupled`, separated by commas";
        duplicate_option: "this option is given twice: keep one";
        enable_not_bool: "`enable` is decided at compile time: write `enable = true` or `enable = false`";
        stub_not_path: "`stub` names a function with the same parameters as this one: write `stub = path::to::function`";
        rank_coupled_with_value: "`rank_coupled` takes no value: write the word alone, or leave it out";
        rank_coupled_without_stub: "a body that waits for other ranks cannot run while each rank captures by itself: add `stub = path`, the function that runs in its place during capture";

        // The derives
        derive_on_enum: "`Freeze` and `Bridge` are derived for structs, because a graph fixes which fields there are: use a struct with `Option` fields, or implement the trait by hand";
        derive_on_union: "`Freeze` and `Bridge` are derived for structs, because the fields of a union cannot be read safely: use a struct, or implement the trait by hand";
        derive_lifetime_param: "a frozen value outlives what it was frozen from, so it cannot borrow: own the data with `Arc<T>`, and remove the lifetime";

        // The derive of kernel arguments
        args_on_enum: "`KernelArgs` is derived for structs, because CUDA has no enum with fields: use a struct, with a `u32` for the choice";
        args_on_union: "`KernelArgs` is derived for structs, because some bytes of a union may be uninitialised: use a struct with a field for each case";
        args_without_repr_c: "without `#[repr(C)]` Rust chooses the order of the fields in memory, and CUDA would choose another: put `#[repr(C)]` on this struct";
        args_other_repr: "CUDA declares this struct as plain C does: write `#[repr(C)]`, without other options";
        args_generic: "a kernel takes one struct of one layout: remove the parameters, and write one struct for each case";
        args_without_names: "CUDA reads arguments by their names: give the struct named fields, at least one";
        args_bool: "CUDA may read any byte here, and a `bool` has only two: use a `u32` that is 0 or 1";
        args_usize: "the width of this type depends on the machine, and CUDA's must not: use `u32`, `u64` or `i64`";
        args_reference: "an address of the host means nothing to a kernel: use a `DevicePtr`, which `OpStream::addr` gives";
        args_other_type: "a kernel has no argument of this type: use `u8` to `u64`, `i8` to `i64`, `f32`, `f64`, `DevicePtr`, an array of one of these, or a struct that derives `KernelArgs`";
        points_to_no_address: "`points_to` says what lies at an address: put it on a field of type `DevicePtr`";
        points_to_syntax: "expected `points_to(T)` or `points_to(const T)`, where `T` is `void`, a number such as `i32` or `f32`, or a struct of the CUDA source";
        points_to_twice: "this field says twice what it points to: keep one";
    }

    // What the compiler asserts of a layout that this crate cannot see.
    pub(crate) const PADDING_BEFORE: &str = "there is padding before this field, bytes that belong to no field: order the fields by size, or put a field such as `_padding: u32` before it";
    pub(crate) const PADDING_AFTER: &str = "there is padding after this field, bytes that belong to no field: put a field such as `_padding: u32` after it";
    pub(crate) const ARGS_TOO_LARGE: &str = "this struct is larger than `ARG_BYTES_MAX`, the most that a launch carries: put a part of it into device memory, and pass its address";
}

/// A signature that can become a break.
pub(crate) struct Break {
    pub(crate) receiver: Option<BreakReceiver>,
    pub(crate) context: ContextParam,
    pub(crate) arguments: Vec<Argument>,
    /// The declared return type, a `Result` by whatever name.
    pub(crate) output: Type,
}

/// The receiver of an annotated method.
pub(crate) struct BreakReceiver {
    pub(crate) self_token: Token![self],
    /// `Self`, or `Arc<Self>`: what is frozen.
    pub(crate) ty: Type,
}

/// `cx: &mut Eager<'_, L>`.
pub(crate) struct ContextParam {
    /// As declared: what the body takes.
    pub(crate) param: PatType,
    pub(crate) name: Ident,
    pub(crate) live: Type,
}

/// A parameter that is frozen.
pub(crate) struct Argument {
    /// As declared: what the body takes.
    pub(crate) param: PatType,
    pub(crate) name: Ident,
    /// `T` of both `T` and `&T`: what is frozen.
    pub(crate) ty: Type,
    pub(crate) by_ref: bool,
}

/// Collects errors, so that one compilation shows all of them.
#[derive(Default)]
struct Errors(Option<Error>);

impl Errors {
    fn push(&mut self, error: Error) {
        match &mut self.0 {
            Some(first) => first.combine(error),
            None => self.0 = Some(error),
        }
    }

    /// The value, or a place in the list of errors.
    fn keep<T>(&mut self, result: syn::Result<T>) -> Option<T> {
        result.map_err(|error| self.push(error)).ok()
    }
}

/// Checks the signature of an annotated function.
pub(crate) fn signature(sig: &Signature) -> syn::Result<Break> {
    let mut errors = Errors::default();
    check_qualifiers(sig, &mut errors);
    // A lifetime parameter is refused once, where it is declared.
    let mut elided = sig.clone();
    ElideDeclared { generics: &sig.generics }.visit_signature_mut(&mut elided);
    let sig = &elided;
    let receiver = sig.receiver().and_then(|receiver| errors.keep(check_receiver(receiver)));
    let mut params = sig.inputs.iter().filter_map(|input| match input {
        FnArg::Typed(param) => Some(param),
        FnArg::Receiver(_) => None,
    });
    let context = match params.next() {
        Some(first) if !is_eager(first) && params.clone().any(is_eager) => None,
        Some(first) => errors.keep(check_context(first)),
        None => {
            errors.push(say::eager_missing(&sig.ident));
            None
        }
    };
    let arguments = params.filter_map(|param| errors.keep(check_argument(param))).collect();
    let output = errors.keep(check_output(sig));
    match (errors.0, context, output) {
        (None, Some(context), Some(output)) => Ok(Break { receiver, context, arguments, output }),
        (error, ..) => Err(error.unwrap_or_else(|| say::eager_missing(&sig.ident))),
    }
}

/// Elides the lifetimes that the function declares.
struct ElideDeclared<'g> {
    generics: &'g Generics,
}

impl VisitMut for ElideDeclared<'_> {
    fn visit_lifetime_mut(&mut self, node: &mut Lifetime) {
        if self.generics.lifetimes().any(|param| param.lifetime == *node) {
            *node = Lifetime::new("'_", node.span());
        }
    }

    fn visit_generics_mut(&mut self, _: &mut Generics) {}
}

fn check_qualifiers(sig: &Signature, errors: &mut Errors) {
    if let Some(token) = &sig.constness {
        errors.push(say::const_fn(token));
    }
    if let Some(token) = &sig.asyncness {
        errors.push(say::async_fn(token));
    }
    if let Safety::Unsafe(token) = &sig.safety {
        errors.push(say::unsafe_fn(token));
    }
    if let Some(abi) = &sig.abi {
        errors.push(say::extern_fn(abi));
    }
    if let Some(variadic) = &sig.variadic {
        errors.push(say::variadic(variadic.dots));
    }
    for param in &sig.generics.params {
        if let GenericParam::Lifetime(param) = param {
            errors.push(say::lifetime_param(&param.lifetime));
        }
    }
}

fn check_receiver(receiver: &Receiver) -> syn::Result<BreakReceiver> {
    let self_token = receiver.self_token;
    let frozen = |ty: Type| Ok(BreakReceiver { self_token, ty });
    match &receiver.kind {
        ReceiverKind::Reference(_, _, Some(_)) => Err(say::self_mut(receiver)),
        ReceiverKind::Reference(_, Some(lifetime), None) => Err(say::lifetime_param(lifetime)),
        ReceiverKind::Reference(_, None, None) => {
            // Placed at `self`, where a missing `Freeze` is then reported.
            let path = Ident::new("Self", self_token.span()).into();
            frozen(Type::Path(TypePath { attrs: Vec::new(), qself: None, path }))
        }
        ReceiverKind::Typed(_, ty) => match unparenthesized(ty) {
            Type::Reference(TypeReference { mutability: Some(_), .. }) => Err(say::self_mut(ty)),
            Type::Reference(TypeReference { lifetime: Some(lifetime), .. }) => Err(say::lifetime_param(lifetime)),
            Type::Reference(TypeReference { elem, .. }) if is_self(elem) || is_named(elem, "Arc") => {
                frozen(Type::clone(elem))
            }
            Type::Path(_) if is_named(ty, "Self") => Err(say::self_by_value(receiver)),
            _ => Err(say::self_other(ty)),
        },
        _ => Err(say::self_by_value(receiver)),
    }
}

fn check_context(param: &PatType) -> syn::Result<ContextParam> {
    let ty = &*param.ty;
    let (elem, is_mut) = match unparenthesized(ty) {
        Type::Reference(reference) => {
            if let Some(lifetime) = &reference.lifetime {
                return Err(say::lifetime_param(lifetime));
            }
            (&*reference.elem, reference.mutability.is_some())
        }
        other => (other, false),
    };
    if is_named(elem, "Context") {
        return Err(say::eager_is_context(ty));
    }
    let Some(path) = path_named(elem, "Eager") else { return Err(say::eager_wrong_type(ty)) };
    if !is_mut {
        return Err(say::eager_not_mut(ty));
    }
    let mut lifetimes = generic_arguments(path).filter_map(|argument| match argument {
        GenericArgument::Lifetime(lifetime) => Some(lifetime),
        _ => None,
    });
    if let Some(lifetime) = lifetimes.find(|lifetime| lifetime.ident != "_") {
        return Err(say::lifetime_param(lifetime));
    }
    let live = first_type_argument(path).ok_or_else(|| say::eager_without_live(elem))?.clone();
    Ok(ContextParam { param: param.clone(), name: plain_name(param)?, live })
}

fn check_argument(param: &PatType) -> syn::Result<Argument> {
    if let Some(attr) = param.attrs.iter().find(|attr| is_cfg(attr)) {
        return Err(say::cfg_argument(attr));
    }
    let name = plain_name(param)?;
    if is_eager(param) {
        return Err(say::eager_not_first(&param.ty));
    }
    let declared = unparenthesized(&param.ty);
    let (ty, by_ref) = match declared {
        Type::Reference(TypeReference { mutability: Some(_), .. }) => {
            return Err(say::mut_ref_argument(&param.ty));
        }
        // A `&'static T` is an owned value: it may be frozen as it is.
        Type::Reference(TypeReference { lifetime: Some(lifetime), .. }) if lifetime.ident == "static" => {
            (declared, false)
        }
        Type::Reference(TypeReference { lifetime: Some(lifetime), .. }) if lifetime.ident != "_" => {
            return Err(say::lifetime_param(lifetime));
        }
        Type::Reference(reference) => (unparenthesized(&reference.elem), true),
        other => (other, false),
    };
    match ty {
        Type::Slice(_) => Err(say::slice_argument(&param.ty)),
        Type::TraitObject(_) => Err(say::dyn_argument(&param.ty)),
        _ if has_impl_trait(ty) => Err(say::impl_trait_argument(&param.ty)),
        _ if by_ref && is_named(ty, "str") => Err(say::str_argument(&param.ty)),
        _ => match first_borrow(ty) {
            Some(_) => Err(say::borrowed_argument(&param.ty)),
            None => Ok(Argument { param: param.clone(), name, ty: ty.clone(), by_ref }),
        },
    }
}

fn check_output(sig: &Signature) -> syn::Result<Type> {
    match &sig.output {
        ReturnType::Default => Err(say::no_return(&sig.ident)),
        ReturnType::Type(_, ty) => match first_borrow(ty) {
            Some(borrow) => Err(say::returned_borrow(borrow)),
            None if may_be_result(ty) => Ok(Type::clone(ty)),
            None => Err(say::return_not_result(ty)),
        },
    }
}

/// Whether `ty` may name a `Result`, or an alias of one. Where the name alone cannot tell, the compiler does.
fn may_be_result(ty: &Type) -> bool {
    const OTHERS: [&str; 12] =
        ["Arc", "Box", "Live", "Option", "Self", "String", "Tensor", "Vec", "bool", "f32", "u32", "usize"];
    match unparenthesized(ty) {
        Type::Path(_) => !OTHERS.iter().any(|other| is_named(ty, other)),
        other => matches!(other, Type::Macro(_)),
    }
}

/// Checks the input of a derive.
pub(crate) fn derive_input(input: &DeriveInput) -> syn::Result<&DataStruct> {
    let data = match &input.data {
        Data::Struct(data) => data,
        Data::Enum(data) => return Err(say::derive_on_enum(data.enum_token)),
        Data::Union(data) => return Err(say::derive_on_union(data.union_token)),
    };
    match input.generics.lifetimes().next() {
        Some(param) => Err(say::derive_lifetime_param(&param.lifetime)),
        None => Ok(data),
    }
}

/// The path of the first parameter's type, if it is `Eager` behind any number of references.
pub(crate) fn eager_path(ty: &mut Type) -> Option<&mut Path> {
    match ty {
        Type::Reference(reference) => eager_path(&mut reference.elem),
        Type::Paren(inner) => eager_path(&mut inner.elem),
        Type::Group(inner) => eager_path(&mut inner.elem),
        Type::Path(TypePath { qself: None, path, .. }) if path.segments.last()?.ident == "Eager" => Some(path),
        _ => None,
    }
}

/// Repairs what the compiler would refuse as well, in the signature that stands in for a refused function; returns the
/// path that callers do not see, if there is one.
pub(crate) fn make_plausible(sig: &mut Signature) -> Option<Path> {
    if let ReturnType::Type(_, ty) = &mut sig.output {
        OwnForever.visit_type_mut(ty);
    }
    let first = sig.inputs.iter_mut().find_map(|input| match input {
        FnArg::Typed(param) => Some(&mut param.ty),
        FnArg::Receiver(_) => None,
    })?;
    let path = eager_path(first)?;
    if first_type_argument(path).is_none() {
        path.segments.last_mut()?.arguments = PathArguments::AngleBracketed(syn::parse_quote!(<'_, ()>));
    }
    Some(path.clone())
}

/// Gives each reference without a lifetime the longest one.
struct OwnForever;

impl VisitMut for OwnForever {
    fn visit_type_reference_mut(&mut self, node: &mut TypeReference) {
        node.lifetime.get_or_insert_with(|| Lifetime::new("'static", Span::call_site()));
        visit_mut::visit_type_reference_mut(self, node);
    }
}

/// Where the compiler should say that an output is no bridge: at `R` of `Result<R>`.
pub(crate) fn output_span(output: &Type) -> Span {
    match unparenthesized(output) {
        Type::Path(TypePath { path, .. }) => first_type_argument(path).map_or_else(|| output.span(), Spanned::span),
        _ => output.span(),
    }
}

fn is_eager(param: &PatType) -> bool {
    is_named(referent(unparenthesized(&param.ty)), "Eager")
}

fn plain_name(param: &PatType) -> syn::Result<Ident> {
    match &*param.pat {
        Pat::Ident(pat) if pat.by_ref.is_none() && pat.subpat.is_none() => Ok(pat.ident.clone()),
        pat => Err(say::pattern_argument(pat)),
    }
}

fn is_cfg(attr: &Attribute) -> bool {
    attr.path().is_ident("cfg") || attr.path().is_ident("cfg_attr")
}

/// `ty` without the parentheses and invisible groups around it.
fn unparenthesized(ty: &Type) -> &Type {
    match ty {
        Type::Paren(inner) => unparenthesized(&inner.elem),
        Type::Group(inner) => unparenthesized(&inner.elem),
        other => other,
    }
}

/// `T` of `&T` and `&mut T`.
fn referent(ty: &Type) -> &Type {
    match ty {
        Type::Reference(reference) => unparenthesized(&reference.elem),
        other => other,
    }
}

fn path_named<'t>(ty: &'t Type, name: &str) -> Option<&'t Path> {
    match unparenthesized(ty) {
        Type::Path(TypePath { qself: None, path, .. }) if path.segments.last()?.ident == name => Some(path),
        _ => None,
    }
}

fn generic_arguments(path: &Path) -> impl Iterator<Item = &GenericArgument> {
    let list = path.segments.last().and_then(|segment| match &segment.arguments {
        PathArguments::AngleBracketed(list) => Some(&list.args),
        _ => None,
    });
    list.into_iter().flatten()
}

fn first_type_argument(path: &Path) -> Option<&Type> {
    generic_arguments(path).find_map(|argument| match argument {
        GenericArgument::Type(ty) => Some(ty),
        _ => None,
    })
}

fn is_named(ty: &Type, name: &str) -> bool {
    path_named(ty, name).is_some()
}

fn is_self(ty: &Type) -> bool {
    matches!(unparenthesized(ty), Type::Path(TypePath { qself: None, path, .. }) if path.is_ident("Self"))
}

fn has_impl_trait(ty: &Type) -> bool {
    let mut search = ImplTraitSearch(false);
    search.visit_type_mut(&mut ty.clone());
    search.0
}

struct ImplTraitSearch(bool);

impl VisitMut for ImplTraitSearch {
    fn visit_type_impl_trait_mut(&mut self, _: &mut syn::TypeImplTrait) {
        self.0 = true;
    }
}

/// The first reference or lifetime in `ty` that is not `'static`.
fn first_borrow(ty: &Type) -> Option<TokenStream> {
    let mut search = BorrowSearch(None);
    search.visit_type_mut(&mut ty.clone());
    search.0
}

struct BorrowSearch(Option<TokenStream>);

impl BorrowSearch {
    fn found(&mut self, tokens: impl ToTokens) {
        self.0.get_or_insert_with(|| tokens.into_token_stream());
    }
}

impl VisitMut for BorrowSearch {
    fn visit_type_reference_mut(&mut self, node: &mut TypeReference) {
        if node.lifetime.as_ref().is_none_or(|lifetime| lifetime.ident != "static") {
            self.found(&*node);
        }
        visit_mut::visit_type_reference_mut(self, node);
    }

    fn visit_lifetime_mut(&mut self, node: &mut Lifetime) {
        if node.ident != "static" {
            self.found(&*node);
        }
    }

    // The lifetimes in the signature of a function type belong to its calls.
    fn visit_type_fn_ptr_mut(&mut self, _: &mut syn::TypeFnPtr) {}
    fn visit_parenthesized_generic_arguments_mut(&mut self, _: &mut syn::ParenthesizedGenericArguments) {}
    fn visit_bound_lifetimes_mut(&mut self, _: &mut syn::BoundLifetimes) {}
}
