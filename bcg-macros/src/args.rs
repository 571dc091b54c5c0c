//! Reads the options of `#[eager_on_graph(…)]`. Owns the grammar only; every message is in [`check`](crate::check).

use proc_macro2::{Ident, TokenStream, TokenTree};
use quote::ToTokens;
use syn::parse::{Parse, ParseStream};
use syn::{Expr, ExprLit, ExprPath, Lit, Result, Token};

use crate::check::say;

/// The options, each at most once.
#[derive(Default)]
pub(crate) struct Options {
    enable: Option<bool>,
    stub: Option<ExprPath>,
    /// The body waits for other ranks, so it needs a stub.
    rank_coupled: Option<Ident>,
}

impl Options {
    /// Whether the function breaks captures. `enable = false` makes it a plain call.
    pub(crate) fn is_enabled(&self) -> bool {
        self.enable.unwrap_or(true)
    }

    /// Whether all ranks come to the body together.
    pub(crate) fn is_rank_coupled(&self) -> bool {
        self.rank_coupled.is_some()
    }

    /// The function that takes the place of the body during a capture.
    pub(crate) fn stub(&self) -> Option<&ExprPath> {
        self.stub.as_ref()
    }

    /// Reads one option, `name` or `name = value`.
    fn read_one(&mut self, input: ParseStream) -> Result<()> {
        let name: TokenTree = input.parse()?;
        let value = if input.peek(Token![=]) {
            input.parse::<Token![=]>()?;
            Value::read(input)
        } else {
            Value::None
        };
        match (name.to_string().as_str(), &name) {
            ("enable", _) => once(&mut self.enable, &name, value.boolean(&name)?),
            ("stub", _) => once(&mut self.stub, &name, value.path(&name)?),
            ("rank_coupled", TokenTree::Ident(ident)) => match value {
                Value::None => once(&mut self.rank_coupled, &name, ident.clone()),
                value => Err(say::rank_coupled_with_value(value.guilty(&name))),
            },
            _ => Err(say::unknown_option(&name)),
        }
    }
}

impl Parse for Options {
    fn parse(input: ParseStream) -> Result<Self> {
        let mut options = Options::default();
        while !input.is_empty() {
            options.read_one(input)?;
            if !input.is_empty() && input.parse::<Option<Token![,]>>()?.is_none() {
                return Err(say::unknown_option(input.parse::<TokenTree>()?));
            }
        }
        match &options.rank_coupled {
            Some(flag) if options.is_enabled() && options.stub.is_none() => Err(say::rank_coupled_without_stub(flag)),
            _ => Ok(options),
        }
    }
}

/// What stands to the right of `name =`.
enum Value {
    None,
    Expr(Box<Expr>),
    /// Not an expression.
    Other(TokenStream),
}

impl Value {
    fn read(input: ParseStream) -> Self {
        match input.parse::<Expr>() {
            Ok(expr) => Value::Expr(Box::new(expr)),
            Err(_) => Value::Other(input.parse().unwrap_or_default()),
        }
    }

    fn boolean(self, name: &TokenTree) -> Result<bool> {
        match self {
            Value::Expr(expr) => match *expr {
                Expr::Lit(ExprLit { lit: Lit::Bool(value), .. }) => Ok(value.value),
                other => Err(say::enable_not_bool(other)),
            },
            value => Err(say::enable_not_bool(value.guilty(name))),
        }
    }

    fn path(self, name: &TokenTree) -> Result<ExprPath> {
        match self {
            Value::Expr(expr) => match *expr {
                Expr::Path(path) => Ok(path),
                other => Err(say::stub_not_path(other)),
            },
            value => Err(say::stub_not_path(value.guilty(name))),
        }
    }

    /// The value's tokens, or the option's name where there are none.
    fn guilty(self, name: &TokenTree) -> TokenStream {
        match self {
            Value::Expr(expr) => expr.into_token_stream(),
            Value::Other(tokens) if !tokens.is_empty() => tokens,
            Value::None | Value::Other(_) => name.to_token_stream(),
        }
    }
}

/// Fills `slot`, or refuses the second use of an option.
fn once<T>(slot: &mut Option<T>, name: &TokenTree, value: T) -> Result<()> {
    if slot.replace(value).is_some() { Err(say::duplicate_option(name)) } else { Ok(()) }
}
