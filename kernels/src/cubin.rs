//! Reads what the compiler wrote into a cubin, for tests: an ELF image of 64 bits, little-endian.

/// A section: its name, its bytes in the file, and the size that it takes in memory.
struct Section<'a> {
    name: &'a str,
    bytes: &'a [u8],
    size: usize,
}

const SECTION_BYTES: usize = 64;
const SYMBOL_BYTES: usize = 24;
/// The type of a section that takes memory and no room in the file.
const NO_BITS: usize = 8;

fn number(image: &[u8], at: usize, bytes: usize) -> usize {
    image[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

fn text(table: &[u8], at: usize) -> &str {
    let end = table[at..].iter().position(|byte| *byte == 0).expect("a terminated name");
    std::str::from_utf8(&table[at..at + end]).expect("a name in ASCII")
}

fn sections(image: &[u8]) -> Vec<Section<'_>> {
    assert!(image.starts_with(b"\x7fELF\x02\x01"), "an ELF image of 64 bits");
    let (table, count, names) = (number(image, 40, 8), number(image, 60, 2), number(image, 62, 2));
    let header = |index: usize| &image[table + index * SECTION_BYTES..][..SECTION_BYTES];
    let bytes = |header: &[u8]| {
        let (offset, size) = (number(header, 24, 8), number(header, 32, 8));
        if number(header, 4, 4) == NO_BITS { 0..0 } else { offset..offset + size }
    };
    let names = &image[bytes(header(names))];
    let section = |header: &[u8]| {
        let name = text(names, number(header, 0, 4));
        Section { name, bytes: &image[bytes(header)], size: number(header, 32, 8) }
    };
    (0..count).map(|index| section(header(index))).collect()
}

/// Returns the value of a `__constant__` number.
pub(crate) fn constant_u32(image: &[u8], name: &str) -> Option<u32> {
    let sections = sections(image);
    let find = |wanted: &str| sections.iter().find(|section| section.name == wanted);
    let (symbols, names) = (find(".symtab")?.bytes, find(".strtab")?.bytes);
    let symbol = symbols.chunks(SYMBOL_BYTES).find(|symbol| text(names, number(symbol, 0, 4)) == name)?;
    let (section, offset) = (&sections[number(symbol, 6, 2)], number(symbol, 8, 8));
    u32::try_from(number(section.bytes, offset, 4)).ok()
}

/// Returns the shared memory that a kernel has without asking for any when it is launched.
pub(crate) fn static_shared_bytes(image: &[u8], kernel: &str) -> usize {
    let wanted = format!(".nv.shared.{kernel}");
    sections(image).iter().find(|section| section.name == wanted).map_or(0, |section| section.size)
}
