//! Turns a checked function into its wrapper.
//!
//! The wrapper has the signature that callers see: `Eager` replaced by `Context`. The body is expanded once, as a closure
//! that captures nothing, so that it works wherever a function works (generic `impl`, trait `impl`, `Self`), keeps its
//! spans, and is reported on once. The closure takes the real arguments when the break runs, and thawed ones at replay.
//!
//! Names made here are hygienic (`mixed_site`) and start with `__bcg_`; paths are absolute.
//!
//! Rejected: an inner `fn` for the body (cannot name the generics of the `impl` around it); a second copy of the body
//! (every error and warning twice).

use proc_macro2::{Group, Ident, Literal, Spacing, Span, TokenStream, TokenTree};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::parse::{Parse, ParseStream};
use syn::spanned::Spanned;
use syn::visit_mut::{self, VisitMut};
use syn::{AttrStyle, Attribute, Block, FnArg, Item, Macro, Pat, PatType, Path, Signature, Token, Type, Visibility};

use crate::args::Options;
use crate::check::{self, Argument, Break, say};

/// The item under the attribute. The body stays as written: whether it parses is the compiler's business.
pub(crate) struct Function {
    attrs: Vec<Attribute>,
    vis: Visibility,
    sig: Signature,
    body: Group,
}

impl Parse for Function {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        let mut attrs = input.call(Attribute::parse_outer)?;
        let vis = input.parse()?;
        if !starts_function(input)? {
            return Err(say::not_a_function(input.parse::<TokenTree>()?));
        }
        let sig: Signature = input.parse()?;
        if input.peek(Token![;]) {
            input.parse::<Token![;]>()?;
            return Err(say::no_body(&sig.ident));
        }
        let body: Group = input.parse()?;
        // Inner attributes of the body belong to the function; a closure's block cannot hold them.
        let Body { inner, rest } = syn::parse2(body.stream())?;
        let body = if inner.is_empty() { body } else { regroup(&body, rest) };
        attrs.extend(inner.into_iter().map(|attr| Attribute { style: AttrStyle::Outer, ..attr }));
        Ok(Function { attrs, vis, sig, body })
    }
}

/// Whether the next tokens are the qualifiers of a function, if any, and `fn`.
fn starts_function(input: ParseStream) -> syn::Result<bool> {
    let ahead = input.fork();
    while !ahead.peek(Token![fn]) {
        let is_qualifier = ahead.peek(Token![const])
            || ahead.peek(Token![async])
            || ahead.peek(Token![unsafe])
            || ahead.peek(Token![extern])
            || ahead.peek(syn::LitStr);
        if !is_qualifier {
            return Ok(false);
        }
        ahead.parse::<TokenTree>()?;
    }
    Ok(true)
}

struct Body {
    inner: Vec<Attribute>,
    rest: TokenStream,
}

impl Parse for Body {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        Ok(Body { inner: input.call(Attribute::parse_inner)?, rest: input.parse()? })
    }
}

/// Expands `#[eager_on_graph(options)] item`, or reports everything that keeps the item from being a break.
pub(crate) fn attribute(options: TokenStream, item: TokenStream) -> TokenStream {
    let function: Function = match syn::parse2(item.clone()) {
        Ok(function) => function,
        // The compiler sees the item as it was, for it may have more to say.
        Err(error) => return [item, error.into_compile_error()].into_iter().collect(),
    };
    match (syn::parse2::<Options>(options), check::signature(&function.sig)) {
        (Ok(options), Ok(checked)) => wrapper(&options, &function, &checked),
        (Err(mut error), Err(other)) => {
            error.combine(other);
            refused(&error, &function)
        }
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => refused(&error, &function),
    }
}

/// The errors, and what callers see of the function without its body, so that no call of it is a second error.
fn refused(error: &syn::Error, function: &Function) -> TokenStream {
    let Function { attrs, vis, sig, .. } = function;
    let mut sig = sig.clone();
    sig.abi = None;
    sig.variadic = None;
    let eager = check::make_plausible(&mut sig).into_iter();
    let sig = caller_signature(&sig);
    let errors = error.to_compile_error();
    quote! {
        #(#attrs)*
        #[allow(unused)]
        #vis #sig {
            #(let _: ::core::option::Option<&mut #eager>;)*
            ::core::unreachable!()
        }
        #errors
    }
}

fn wrapper(options: &Options, function: &Function, checked: &Break) -> TokenStream {
    let Function { attrs, vis, sig, body } = function;
    let mut caller = caller_signature(sig);
    let block = if options.is_enabled() {
        drop_mutability(&mut caller);
        breaking_block(options, &sig.ident, body, checked)
    } else {
        plain_block(body, checked)
    };
    quote! {
        #(#attrs)*
        #vis #caller #block
    }
}

/// `enable = false`: the body runs in place, in whatever mode the context is in.
fn plain_block(body: &Group, checked: &Break) -> TokenStream {
    let Break { context, output, .. } = checked;
    let (param, cx) = (&context.param, &context.name);
    quote_spanned!(Span::mixed_site()=> {
        ::bcg_runtime::__private::plain_call(#cx, |#param| -> #output #body)
    })
}

/// The body as a closure, and the call of the runtime with each way to use it.
fn breaking_block(options: &Options, name: &Ident, body: &Group, checked: &Break) -> TokenStream {
    let Break { receiver, context, arguments, output } = checked;
    let self_param = receiver.as_ref().map(|receiver| {
        let (name, ty) = (body_self(receiver.self_token.span()), &receiver.ty);
        quote!(#name: &#ty,)
    });
    let body = if receiver.is_some() { with_body_self(body) } else { body.clone() };
    let (context_param, params) = (&context.param, arguments.iter().map(|argument| &argument.param));

    let site = site(name, options.is_rank_coupled());
    let owned = Owned::of(arguments);
    let hold = owned.hold();
    let inputs = Input::all(checked);
    let freeze = freeze_closure(&inputs, &owned);
    let run = run_closure(&quote_spanned!(Span::mixed_site()=> __bcg_body), &inputs, &owned);
    let stub = options.stub().map(|path| run_closure(&path.to_token_stream(), &inputs, &owned)).into_iter();
    let replay = replay_closure(&inputs);
    // A bound that the output or the live batch does not meet is reported where that type is written.
    let entry = if options.stub().is_some() { "eager_break_stubbed" } else { "eager_break" };
    let entry = Ident::new(entry, Span::mixed_site());
    let mut cx = context.name.clone();
    cx.set_span(context.live.span().resolved_at(cx.span()));
    let values = quote_spanned!(Span::mixed_site()=> #cx, &__BCG_SITE, #freeze, #run, #(#stub,)* #replay);
    let call = quote_spanned!(check::output_span(output)=> ::bcg_runtime::__private::#entry(#values));
    quote_spanned!(Span::mixed_site()=> {
        static __BCG_SITE: ::bcg_runtime::__private::BreakSite = #site;
        let __bcg_body = |#self_param #context_param #(, #params)*| -> #output #body;
        #hold
        #call
    })
}

/// Where the break stands in the source: the line of its name.
fn site(name: &Ident, is_rank_coupled: bool) -> TokenStream {
    let text = Literal::string(&name.to_string());
    let line = quote_spanned!(name.span()=> ::core::line!());
    quote_spanned!(Span::mixed_site()=> ::bcg_runtime::__private::BreakSite {
        name: #text,
        file: ::core::file!(),
        line: #line,
        is_rank_coupled: #is_rank_coupled,
    })
}

/// What is frozen for replay: the receiver, then the arguments.
struct Input<'c> {
    /// The value's name in the wrapper.
    source: TokenStream,
    ty: &'c Type,
    by_ref: bool,
    is_receiver: bool,
}

impl<'c> Input<'c> {
    fn all(checked: &'c Break) -> Vec<Self> {
        let receiver = checked.receiver.as_ref().map(|receiver| Input {
            source: receiver.self_token.to_token_stream(),
            ty: &receiver.ty,
            by_ref: true,
            is_receiver: true,
        });
        let arguments = checked.arguments.iter().map(|argument| Input {
            source: argument.name.to_token_stream(),
            ty: &argument.ty,
            by_ref: argument.by_ref,
            is_receiver: false,
        });
        receiver.into_iter().chain(arguments).collect()
    }

    /// `<T as Freeze>::method(arguments)`, placed at `T` as if written there, so that a missing `Freeze` is one error.
    fn freeze_call(&self, method: &str, arguments: &TokenStream) -> TokenStream {
        let (ty, span) = (self.ty, self.ty.span());
        let method = Ident::new(method, span);
        let freeze = quote_spanned!(span.resolved_at(Span::mixed_site())=> ::bcg_runtime::Freeze);
        quote_spanned!(span=> <#ty as #freeze>::#method(#arguments))
    }
}

/// Calls `callee` with the values that `value` makes of the inputs, in the order of the signature.
fn call(callee: &TokenStream, inputs: &[Input], value: impl Fn(usize, &Input) -> TokenStream) -> TokenStream {
    let values: Vec<_> = inputs.iter().enumerate().map(|(i, input)| value(i, input)).collect();
    let (receiver, arguments) = values.split_at(usize::from(inputs.first().is_some_and(|input| input.is_receiver)));
    quote_spanned!(Span::mixed_site()=> #callee(#(#receiver,)* __bcg_eager, #(#arguments),*))
}

fn freeze_closure(inputs: &[Input], owned: &Owned) -> TokenStream {
    let peek = owned.peek();
    let frozen = inputs.iter().map(|input| {
        let source = &input.source;
        input.freeze_call("freeze", &quote_spanned!(Span::mixed_site()=> #source, __bcg_freezer))
    });
    quote_spanned!(Span::mixed_site()=> |__bcg_freezer| {
        #peek
        ::core::result::Result::Ok((#(#frozen?,)*))
    })
}

fn run_closure(callee: &TokenStream, inputs: &[Input], owned: &Owned) -> TokenStream {
    let take = owned.take();
    let call = call(callee, inputs, |_, input| input.source.clone());
    quote_spanned!(Span::mixed_site()=> |__bcg_eager| {
        #take
        #call
    })
}

fn replay_closure(inputs: &[Input]) -> TokenStream {
    let local = |i: usize| format_ident!("__bcg_{i}", span = Span::mixed_site());
    let names = || (0..inputs.len()).map(local);
    let fields = names();
    let thaws = inputs.iter().enumerate().map(|(i, input)| {
        let name = local(i);
        let thaw = input.freeze_call("thaw", &quote_spanned!(Span::mixed_site()=> #name, __bcg_thaw));
        quote_spanned!(Span::mixed_site()=> let #name = #thaw;)
    });
    let body = quote_spanned!(Span::mixed_site()=> __bcg_body);
    let call = call(&body, inputs, |i, input| {
        let name = local(i);
        if input.by_ref { quote!(&#name) } else { quote!(#name) }
    });
    quote_spanned!(Span::mixed_site()=> move |__bcg_eager, (#(#fields,)*), __bcg_thaw| {
        #(#thaws)*
        #call
    })
}

/// The arguments taken by value: one closure looks at them (to freeze), then one closure consumes them (to run), and
/// both exist at once; so they wait in a cell between the two.
struct Owned<'c>(Vec<&'c Ident>);

impl<'c> Owned<'c> {
    fn of(arguments: &'c [Argument]) -> Self {
        Owned(arguments.iter().filter(|argument| !argument.by_ref).map(|argument| &argument.name).collect())
    }

    fn hold(&self) -> TokenStream {
        let names = &self.0;
        self.unless_empty(quote_spanned! {Span::mixed_site()=>
            let __bcg_owned = ::core::cell::RefCell::new(::core::option::Option::Some((#(#names,)*)));
        })
    }

    fn peek(&self) -> TokenStream {
        let names = &self.0;
        self.unless_empty(quote_spanned! {Span::mixed_site()=>
            let __bcg_owned = __bcg_owned.borrow();
            let (#(#names,)*) = __bcg_owned.as_ref().expect("bcg: the arguments of a break are frozen before it runs");
        })
    }

    fn take(&self) -> TokenStream {
        let names = &self.0;
        self.unless_empty(quote_spanned! {Span::mixed_site()=>
            let (#(#names,)*) = __bcg_owned.take().expect("bcg: a break runs once for each call");
        })
    }

    fn unless_empty(&self, tokens: TokenStream) -> TokenStream {
        if self.0.is_empty() { TokenStream::new() } else { tokens }
    }
}

/// `sig` with `Eager` replaced by `Context`, and without the attributes of parameters, which stay at the body.
fn caller_signature(sig: &Signature) -> Signature {
    let mut sig = sig.clone();
    let mut is_first = true;
    for input in &mut sig.inputs {
        let FnArg::Typed(param) = input else { continue };
        param.attrs.clear();
        if std::mem::replace(&mut is_first, false)
            && let Some(path) = check::eager_path(&mut param.ty)
        {
            *path = context_path(path);
        }
    }
    sig
}

/// `::bcg_runtime::Context` with the generic arguments of `eager`.
fn context_path(eager: &Path) -> Path {
    let mut path: Path = syn::parse_quote_spanned!(eager.span()=> ::bcg_runtime::Context);
    if let (Some(to), Some(from)) = (path.segments.last_mut(), eager.segments.last()) {
        to.arguments = from.arguments.clone();
    }
    path
}

/// The wrapper only passes its arguments on; `mut` is the body's.
fn drop_mutability(sig: &mut Signature) {
    for input in &mut sig.inputs {
        if let FnArg::Typed(PatType { pat, .. }) = input
            && let Pat::Ident(pat) = &mut **pat
        {
            pat.mutability = None;
        }
    }
}

/// The name of the receiver inside the body's closure, where `self` cannot be a parameter. It is as hygienic as the
/// `self` that it replaces, so that errors point at the whole of `self.field`.
fn body_self(span: Span) -> Ident {
    Ident::new("__bcg_self", span)
}

/// `body` with its `self` renamed. Items in it keep theirs.
fn with_body_self(body: &Group) -> Group {
    match syn::parse2::<Block>(body.to_token_stream()) {
        Ok(mut block) => {
            RenameSelf.visit_block_mut(&mut block);
            match block.into_token_stream().into_iter().next() {
                Some(TokenTree::Group(group)) => regroup(body, group.stream()),
                _ => body.clone(),
            }
        }
        // The compiler has its own words for what is wrong with it.
        Err(_) => regroup(body, rename_self(body.stream())),
    }
}

struct RenameSelf;

impl VisitMut for RenameSelf {
    fn visit_path_mut(&mut self, path: &mut Path) {
        if path.is_ident("self") {
            path.segments[0].ident = body_self(path.segments[0].ident.span());
        }
        visit_mut::visit_path_mut(self, path);
    }

    fn visit_macro_mut(&mut self, mac: &mut Macro) {
        // A macro that is given a whole method is given that method's `self`.
        if !has_fn(mac.tokens.clone()) {
            mac.tokens = rename_self(std::mem::take(&mut mac.tokens));
        }
    }

    fn visit_item_mut(&mut self, _: &mut Item) {}
}

fn has_fn(tokens: TokenStream) -> bool {
    tokens.into_iter().any(|token| match token {
        TokenTree::Ident(ident) => ident == "fn",
        TokenTree::Group(group) => has_fn(group.stream()),
        _ => false,
    })
}

/// Renames `self` in tokens that do not parse, except at the start of a path (`self::item`).
fn rename_self(tokens: TokenStream) -> TokenStream {
    let mut renamed = Vec::new();
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        renamed.push(match token {
            TokenTree::Ident(ident) if ident == "self" => match tokens.peek() {
                Some(TokenTree::Punct(next)) if next.as_char() == ':' && next.spacing() == Spacing::Joint => {
                    ident.into()
                }
                _ => body_self(ident.span()).into(),
            },
            TokenTree::Group(group) => regroup(&group, rename_self(group.stream())).into(),
            TokenTree::Literal(literal) => rename_captured_self(literal).into(),
            other => other,
        });
    }
    renamed.into_iter().collect()
}

/// Renames `self` where a format string captures it: `"{self}"`, `"{self:?}"`.
fn rename_captured_self(literal: Literal) -> Literal {
    let text = literal.to_string();
    if !text.starts_with('"') || !text.contains("{self") {
        return literal;
    }
    let renamed = text.replace("{self}", "{__bcg_self}").replace("{self:", "{__bcg_self:");
    match renamed.parse::<Literal>() {
        Ok(mut renamed) => {
            renamed.set_span(literal.span());
            renamed
        }
        Err(_) => literal,
    }
}

/// `group` with other tokens inside, at the same place.
fn regroup(group: &Group, tokens: TokenStream) -> Group {
    let mut made = Group::new(group.delimiter(), tokens);
    made.set_span(group.span());
    made
}
