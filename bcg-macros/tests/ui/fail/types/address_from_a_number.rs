use bcg_runtime::DevicePtr;

fn main() {
    let _ = DevicePtr(0x1000);
    let _ = DevicePtr::from(0x1000u64);
}
