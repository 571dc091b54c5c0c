//! Rows filled, copied and put in order.

ops! {
    copy_rows,
    fill,
    fill_random,
    gather_rows,
    push_rows,
    unpack_inputs,
}
