//! Nothing that the user defines can stand in the way of the wrapper.
#![deny(warnings)]
#![allow(dead_code, unused_macros, non_camel_case_types)]

struct Result;
struct Ok;
struct Option;
struct Context;
trait Freeze {}
mod core {}
mod std {}

type Out = ::bcg_runtime::Result<::bcg_runtime::Tensor>;

macro_rules! Some {
    () => {};
}

#[::bcg_runtime::eager_on_graph]
fn eager(
    claims: &mut ::bcg_runtime::Eager<'_, ()>,
    frozen: &::bcg_runtime::Tensor,
    thaw: &::bcg_runtime::Tensor,
    eager: usize,
    r#type: bool,
) -> Out {
    let __bcg_body = claims.is_capturing();
    assert!(!__bcg_body && eager == 1 && r#type && thaw.dim(0) == 1);
    ::core::result::Result::Ok(frozen.clone())
}

macro_rules! make_break {
    ($name:ident, $cx:ident, $($arg:ident: $ty:ty),*) => {
        #[::bcg_runtime::eager_on_graph]
        fn $name($cx: &mut ::bcg_runtime::Eager<'_, ()>, hidden: &::bcg_runtime::Tensor, $($arg: $ty),*) -> Out {
            $cx.synchronize()?;
            $(let _: $ty = $arg;)*
            ::core::result::Result::Ok(hidden.clone())
        }

        impl Layer {
            #[::bcg_runtime::eager_on_graph]
            fn $name(self: &::std::sync::Arc<Self>, $cx: &mut ::bcg_runtime::Eager<'_, ()>, $($arg: $ty),*) -> Out {
                $cx.synchronize()?;
                $(let _: $ty = $arg;)*
                ::core::result::Result::Ok(self.0.clone())
            }
        }
    };
}

struct Layer(::bcg_runtime::Tensor);

make_break!(made, cx, x: &::bcg_runtime::Tensor, hidden: usize);

fn main() {}
