//! Argument structs of kernels: described once, in Rust, and declared for CUDA from that description.
//!
//! - `#[derive(KernelArgs)]` makes the description; no CUDA source declares such a struct by hand.
//! - The generated text checks itself: CUDA must find the size of each struct, and the offset of each field, that Rust has.
//! - It uses plain C types and declares what its pointers point to, so it can be included before any other header.

use std::fmt::{self, Write};

/// A kernel's argument struct, as CUDA declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArgStruct {
    /// Its name, in Rust and in CUDA.
    pub name: &'static str,
    /// Its size.
    pub bytes: usize,
    /// Its fields, in their order in memory.
    pub fields: &'static [ArgField],
}

impl ArgStruct {
    /// Compares, as `==` does, at compile time.
    pub(crate) const fn is(&self, other: &Self) -> bool {
        if !is_text(self.name, other.name) || self.bytes != other.bytes || self.fields.len() != other.fields.len() {
            return false;
        }
        let mut i = 0;
        while i < self.fields.len() {
            let (a, b) = (&self.fields[i], &other.fields[i]);
            if !is_text(a.name, b.name) || a.offset != b.offset || !a.ty.is(&b.ty) {
                return false;
            }
            i += 1;
        }
        true
    }

    /// Returns the first address in `args`, the bytes of such a struct, that a kernel may write to and that is not null.
    pub(crate) fn first_output(&self, args: &[u8]) -> Option<u64> {
        self.fields.iter().find_map(|field| {
            let bytes = args.get(field.offset..)?;
            match field.ty.element {
                Element::Pointer { is_const: false, .. } => {
                    Some(u64::from_ne_bytes(*bytes.first_chunk()?)).filter(|address| *address != 0)
                }
                Element::Struct(of) => of.first_output(bytes),
                Element::Pointer { is_const: true, .. } | Element::Number(_) => None,
            }
        })
    }
}

const fn is_text(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// A field of an [`ArgStruct`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArgField {
    /// Its name, in Rust and in CUDA.
    pub name: &'static str,
    /// Its type.
    pub ty: ArgType,
    /// Its distance from the start of the struct, in bytes.
    pub offset: usize,
}

/// The type of an [`ArgField`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArgType {
    element: Element,
    /// The length, if the type is an array.
    len: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Element {
    /// A number, by its name in Rust.
    Number(&'static str),
    /// An address of what has this name in Rust, or in the CUDA source.
    Pointer {
        is_const: bool,
        to: &'static str,
    },
    Struct(&'static ArgStruct),
}

impl ArgType {
    /// Names the type of a number, as Rust does.
    const fn number(name: &'static str) -> Self {
        Self { element: Element::Number(name), len: None }
    }

    /// Names the type of an address of anything.
    pub(crate) const fn pointer() -> Self {
        Self { element: Element::Pointer { is_const: false, to: "void" }, len: None }
    }

    /// Names the type of a nested struct.
    pub const fn of_struct(of: &'static ArgStruct) -> Self {
        Self { element: Element::Struct(of), len: None }
    }

    /// Names the type of an address of `to`: `void`, a number as Rust names it, or a struct of the CUDA source.
    ///
    /// # Panics
    /// At compile time, if this is not an address, or an array of addresses.
    #[must_use]
    pub const fn pointing_to(self, is_const: bool, to: &'static str) -> Self {
        assert!(matches!(self.element, Element::Pointer { .. }), "`points_to` says what lies at a `DevicePtr`");
        Self { element: Element::Pointer { is_const, to }, ..self }
    }

    const fn is(&self, other: &Self) -> bool {
        let is_len = match (self.len, other.len) {
            (Some(a), Some(b)) => a == b,
            (None, None) => true,
            _ => false,
        };
        is_len
            && match (&self.element, &other.element) {
                (Element::Number(a), Element::Number(b)) => is_text(a, b),
                (
                    Element::Pointer { is_const: a_is_const, to: a },
                    Element::Pointer { is_const: b_is_const, to: b },
                ) => *a_is_const == *b_is_const && is_text(a, b),
                (Element::Struct(a), Element::Struct(b)) => a.is(b),
                _ => false,
            }
    }

    const fn array(self, len: usize) -> Self {
        assert!(self.len.is_none(), "an array in an argument struct has one dimension");
        assert!(len > 0, "an array in an argument struct has at least one element");
        Self { len: Some(len), ..self }
    }
}

/// A type that a field of a kernel's argument struct can have.
///
/// # Safety
/// The type has no padding, holds no address of the host, and has in CUDA the size, alignment and meaning that [`TYPE`]
/// describes. Kernels and host references read what is given for one.
///
/// [`TYPE`]: ArgValue::TYPE
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a field of a kernel's argument struct",
    label = "CUDA has no such type",
    note = "use `u8` to `u64`, `i8` to `i64`, `f32`, `f64`, `DevicePtr`, an array of one of these, or a struct that derives `KernelArgs`"
)]
pub unsafe trait ArgValue: Copy + Send + Sync + 'static {
    /// The type in CUDA.
    const TYPE: ArgType;
}

macro_rules! numbers {
    ($($name:ident),*) => {
        $(
            // SAFETY: a number has no padding, and `c_number` names the type that CUDA has for it on every machine.
            unsafe impl ArgValue for $name {
                const TYPE: ArgType = ArgType::number(stringify!($name));
            }
        )*
    };
}

numbers!(u8, u16, u32, u64, i8, i16, i32, i64, f32, f64);

// SAFETY: an array is its elements without anything between them, in Rust as in C.
unsafe impl<T: ArgValue, const N: usize> ArgValue for [T; N] {
    const TYPE: ArgType = T::TYPE.array(N);
}

/// A kernel's argument struct, which it takes by value: derive it.
///
/// # Safety
/// The type is `#[repr(C)]`, its fields are [`ArgValue`]s without padding between or after them, and [`STRUCT`] describes
/// them. `#[derive(KernelArgs)]` proves that.
///
/// [`STRUCT`]: KernelArgs::STRUCT
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a kernel's argument struct",
    note = "put `#[repr(C)]` and `#[derive(Clone, Copy, KernelArgs)]` on a struct of the arguments"
)]
pub unsafe trait KernelArgs: ArgValue {
    /// The struct, as CUDA declares it.
    const STRUCT: &'static ArgStruct;
}

/// What C calls a number, or `void`, of Rust.
fn c_number(name: &str) -> Option<&'static str> {
    Some(match name {
        "void" => "void",
        "u8" => "unsigned char",
        "u16" => "unsigned short",
        "u32" => "unsigned int",
        "u64" => "unsigned long long",
        "i8" => "signed char",
        "i16" => "short",
        "i32" => "int",
        "i64" => "long long",
        "f32" => "float",
        "f64" => "double",
        _ => return None,
    })
}

/// Returns the text of a header that declares `structs`, and those inside them, each once.
pub(super) fn header<'a>(structs: impl Iterator<Item = &'a ArgStruct>) -> String {
    let mut header = Declarations {
        text: "// Generated from the argument structs in Rust.\n#pragma once\n".to_owned(),
        structs: Vec::new(),
        pointees: Vec::new(),
    };
    structs.for_each(|one| header.declare(one));
    header.text
}

/// A header, as far as it is written.
struct Declarations<'a> {
    text: String,
    structs: Vec<&'a ArgStruct>,
    pointees: Vec<&'a str>,
}

impl<'a> Declarations<'a> {
    /// Declares a struct after what it needs. Another struct of a name that is taken is declared too: CUDA refuses it.
    fn declare(&mut self, one: &'a ArgStruct) {
        if self.structs.contains(&one) {
            return;
        }
        self.structs.push(one);
        for field in one.fields {
            match field.ty.element {
                Element::Struct(inner) => self.declare(inner),
                Element::Pointer { to, .. } if c_number(to).is_none() && !self.pointees.contains(&to) => {
                    self.pointees.push(to);
                    self.line(format_args!("struct {to};"));
                }
                Element::Pointer { .. } | Element::Number(_) => {}
            }
        }
        let ArgStruct { name, bytes, fields } = one;
        self.line(format_args!("struct {name} {{"));
        for ArgField { name, ty, .. } in *fields {
            let array = ty.len.map_or_else(String::new, |len| format!("[{len}]"));
            self.line(format_args!("    {}{name}{array};", c_type(ty.element)));
        }
        self.line(format_args!("}};"));
        self.line(format_args!("static_assert(sizeof({name}) == {bytes}, \"{name} has another size in Rust\");"));
        for ArgField { name: field, offset, .. } in *fields {
            // NVRTC has no `offsetof`; this is what its front end makes of one.
            let place = format!("__INTADDR__(&(({name}*)0)->{field})");
            let message = format!("{name}::{field} lies elsewhere in Rust");
            self.line(format_args!("static_assert({place} == {offset}, \"{message}\");"));
        }
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// The type of a field without its name: `float `, `const int* `.
fn c_type(element: Element) -> String {
    match element {
        Element::Number(name) => format!("{} ", c_number(name).unwrap_or(name)),
        Element::Struct(inner) => format!("{} ", inner.name),
        Element::Pointer { is_const, to } => {
            format!("{}{}* ", if is_const { "const " } else { "" }, c_number(to).unwrap_or(to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::{Arch, CompileError, Source, compile_uncached};
    use crate::{DevicePtr, KernelArgs};

    #[repr(C)]
    #[derive(Clone, Copy, KernelArgs)]
    struct PageArgs {
        #[points_to(const bf16)]
        pages: DevicePtr,
        num_pages: i64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, KernelArgs)]
    struct ReadArgs {
        own: PageArgs,
        other: PageArgs,
        #[points_to(f32)]
        outs: [DevicePtr; 2],
        scratch: DevicePtr,
        rows: u32,
        scale: f32,
    }

    #[test]
    fn a_header_declares_what_rust_declares() {
        let expected = "\
// Generated from the argument structs in Rust.
#pragma once
struct bf16;
struct PageArgs {
    const bf16* pages;
    long long num_pages;
};
static_assert(sizeof(PageArgs) == 16, \"PageArgs has another size in Rust\");
static_assert(__INTADDR__(&((PageArgs*)0)->pages) == 0, \"PageArgs::pages lies elsewhere in Rust\");
static_assert(__INTADDR__(&((PageArgs*)0)->num_pages) == 8, \"PageArgs::num_pages lies elsewhere in Rust\");
struct ReadArgs {
    PageArgs own;
    PageArgs other;
    float* outs[2];
    void* scratch;
    unsigned int rows;
    float scale;
};
static_assert(sizeof(ReadArgs) == 64, \"ReadArgs has another size in Rust\");
static_assert(__INTADDR__(&((ReadArgs*)0)->own) == 0, \"ReadArgs::own lies elsewhere in Rust\");
static_assert(__INTADDR__(&((ReadArgs*)0)->other) == 16, \"ReadArgs::other lies elsewhere in Rust\");
static_assert(__INTADDR__(&((ReadArgs*)0)->outs) == 32, \"ReadArgs::outs lies elsewhere in Rust\");
static_assert(__INTADDR__(&((ReadArgs*)0)->scratch) == 48, \"ReadArgs::scratch lies elsewhere in Rust\");
static_assert(__INTADDR__(&((ReadArgs*)0)->rows) == 56, \"ReadArgs::rows lies elsewhere in Rust\");
static_assert(__INTADDR__(&((ReadArgs*)0)->scale) == 60, \"ReadArgs::scale lies elsewhere in Rust\");
";
        assert_eq!(header([ReadArgs::STRUCT, PageArgs::STRUCT].into_iter()), expected);
    }

    /// A struct whose description has two fields of one size in each other's place.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct SwappedArgs {
        rows: u32,
        columns: u32,
    }

    const SWAPPED: &ArgStruct = &ArgStruct {
        name: "SwappedArgs",
        bytes: size_of::<SwappedArgs>(),
        fields: &[
            ArgField { name: "columns", ty: u32::TYPE, offset: std::mem::offset_of!(SwappedArgs, columns) },
            ArgField { name: "rows", ty: u32::TYPE, offset: std::mem::offset_of!(SwappedArgs, rows) },
        ],
    };

    // SAFETY: nothing reads or launches one; the description is wrong on purpose, so that CUDA refuses it.
    unsafe impl ArgValue for SwappedArgs {
        const TYPE: ArgType = ArgType::of_struct(SWAPPED);
    }

    // SAFETY: as above.
    unsafe impl KernelArgs for SwappedArgs {
        const STRUCT: &'static ArgStruct = SWAPPED;
    }

    /// Compiles for all architectures alike; `None` on a machine without NVRTC, unless `BCG_NVRTC` promises one.
    fn compiled(source: &Source) -> Option<Result<Vec<u8>, CompileError>> {
        match compile_uncached(source, Arch::new(8, 0)) {
            Err(CompileError::NoCompiler { .. }) if std::env::var_os("BCG_NVRTC").is_none() => None,
            result => Some(result),
        }
    }

    #[test]
    fn two_swapped_fields_do_not_compile() {
        let swapped = Source::new("swapped.cu", "#include \"args.cuh\"").takes::<SwappedArgs>();
        let text = swapped.args_header();
        let (declared, asserted) = text.split_once("};").unwrap();
        assert!(declared.ends_with("{\n    unsigned int columns;\n    unsigned int rows;\n"), "{text}");
        assert!(asserted.contains("static_assert(__INTADDR__(&((SwappedArgs*)0)->columns) == 4,"), "{text}");
        if let Some(result) = compiled(&swapped) {
            let said = result.expect_err("fields that are swapped").to_string();
            assert!(said.contains("SwappedArgs::columns lies elsewhere in Rust"), "{said}");
        }
    }

    #[test]
    fn a_derived_struct_and_a_constant_compile() {
        let text = "#include \"args.cuh\"\n#include \"bcg.cuh\"\nextern \"C\" __global__ void read(ReadArgs a) {\n    \
                    static_assert(ROWS == 12, \"the constant of Rust\");\n    \
                    a.outs[1][a.rows] = a.scale * to_f32(a.own.pages[a.other.num_pages]);\n}\n";
        let source = Source::new("read.cu", text).takes::<ReadArgs>().define("ROWS", 12);
        if let Some(result) = compiled(&source) {
            result.expect("a kernel that reads what Rust declares");
        }
    }

    #[test]
    fn structs_are_compared_whole_at_compile_time() {
        const SOURCE: Source = Source::new("read.cu", "").takes::<ReadArgs>();
        const { assert!(SOURCE.lists(ReadArgs::STRUCT) && !SOURCE.lists(PageArgs::STRUCT)) };
        let wider = ArgStruct { bytes: 72, ..*ReadArgs::STRUCT };
        let shorter = ArgStruct { fields: &ReadArgs::STRUCT.fields[1..], ..*ReadArgs::STRUCT };
        let renamed = ArgStruct { name: "ReadArg", ..*ReadArgs::STRUCT };
        for other in [wider, shorter, renamed, *SWAPPED, *PageArgs::STRUCT] {
            assert!(!ReadArgs::STRUCT.is(&other) && other.is(&other), "{other:?}");
        }
    }
}
