//! Memory of one device that others reach, at the same address.
//!
//! On GPUs it is mapped memory with access for the others; a host device adopts the bytes of another one. No work may use it
//! when its last handle drops: handles are kept by whatever enqueues work on it, on any device.

use super::{Device, DeviceKind, Reservation};
use crate::{DevicePtr, Error, Result};

/// The memory, until it is dropped.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    device: Device,
    with: Vec<Device>,
    /// On a host device; the mapping owns that of a GPU.
    host: Option<DevicePtr>,
    mapping: Option<Reservation>,
    bytes: usize,
}

impl SharedMemory {
    pub(crate) fn new(device: &Device, with: &[Device], bytes: usize) -> Result<Self> {
        device.check_unsealed()?;
        if let Some(other) = with.iter().find(|other| other.kind() != device.kind()) {
            let message = format!("{} and {} are of different kinds", device.name(), other.name());
            return Err(Error::Option { option: "Device::empty_shared", message });
        }
        let with: Vec<Device> = with.iter().filter(|other| !other.is(device)).cloned().collect();
        let bytes = bytes.max(1);
        let mut memory = Self { device: device.clone(), with, host: None, mapping: None, bytes };
        match device.kind() {
            DeviceKind::Host => {
                let others: Vec<_> = memory.with.iter().filter_map(Device::host_control).collect();
                let control = device.host_control().ok_or_else(|| Error::other("a host device has controls"))?;
                memory.host = Some(control.alloc_shared(bytes, &others)?);
                device.counters().add_memory(bytes);
            }
            DeviceKind::Cuda => memory.mapping = Some(map_for(device, &memory.with, bytes)?),
        }
        Ok(memory)
    }

    pub(crate) fn ptr(&self) -> DevicePtr {
        self.mapping.as_ref().map(Reservation::base).or(self.host).unwrap_or(DevicePtr::NULL)
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn is_reachable_from(&self, device: &Device) -> bool {
        self.device.is(device) || self.with.iter().any(|other| other.is(device))
    }
}

/// Maps memory of a GPU that those of `with` may read and write too.
///
/// # Errors
/// [`Error::NoDevice`] names a GPU that cannot reach it; [`Error::OutOfMemory`]; the driver's.
pub(crate) fn map_for(device: &Device, with: &[Device], bytes: usize) -> Result<Reservation> {
    let mut mapping = Reservation::new(device, bytes)?;
    mapping.grow(bytes)?;
    for other in with {
        let Some(ordinal) = other.backend().ordinal() else { continue };
        let shared = device.backend().share(mapping.base(), mapping.mapped_bytes(), &[ordinal]);
        shared.map_err(|error| match error {
            Error::Driver { .. } => Error::NoDevice(format!(
                "{}: its memory cannot be reached by {} ({error}); choose GPUs with a link",
                device.name(),
                other.name()
            )),
            error => error,
        })?;
    }
    Ok(mapping)
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        for other in &self.with {
            match self.host {
                Some(ptr) => other.host_control().into_iter().for_each(|control| control.free_shared(ptr)),
                None => {
                    if let Err(error) = other.backend().synchronize() {
                        tracing::warn!(device = other.name(), %error, "waiting before shared memory is freed");
                    }
                }
            }
        }
        if let (Some(ptr), Some(control)) = (self.host, self.device.host_control()) {
            control.free_shared(ptr);
            self.device.counters().sub_memory(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{DType, Device, Error, Event, Runner, RunnerOptions};

    /// Two devices, a tensor of the second that the first one writes, and a runner on each.
    fn pair(seed: u64) -> crate::Result<(Runner, Runner, crate::Tensor)> {
        let (near, far) = (Device::host(), Device::host());
        for device in [&near, &far] {
            device.host_control().expect("a host device").reseed(seed);
        }
        let shared = far.zeros_shared(std::slice::from_ref(&near), &[2], DType::I32)?;
        let runner = |device| Runner::new(device, RunnerOptions::default());
        Ok((runner(&near)?, runner(&far)?, shared))
    }

    #[test]
    fn an_event_orders_the_work_of_two_devices() -> crate::Result<()> {
        for seed in 0..8 {
            let (mut near, mut far, shared) = pair(seed)?;
            let (written, read) = (Event::new(near.device())?, Event::new(far.device())?);
            let out = far.device().zeros(&[2], DType::I32)?;
            for round in 0..4i32 {
                let data = near.device().tensor(&[2], &[round, -round])?;
                near.wait_for(&read)?;
                near.eager(&(), |cx| cx.copy(&shared, &data))?;
                near.record(&written)?;
                far.wait_for(&written)?;
                far.eager(&(), |cx| cx.copy(&out, &shared))?;
                far.record(&read)?;
                assert_eq!(far.read::<i32>(&out)?, [round, -round]);
            }
        }
        Ok(())
    }

    #[test]
    fn without_an_event_the_order_is_open() -> crate::Result<()> {
        let (mut near, far, shared) = pair(0)?;
        let data = near.device().tensor(&[2], &[1, 2])?;
        near.eager(&(), |cx| cx.copy(&shared, &data))?; // queued, and nobody waits for it
        assert_eq!(far.device().read::<i32>(&shared)?, [0, 0]);
        near.synchronize()?;
        assert_eq!(far.device().read::<i32>(&shared)?, [1, 2]);
        Ok(())
    }

    #[test]
    fn only_devices_that_were_named_reach_it_and_it_leaves_nothing() -> crate::Result<()> {
        let (mut near, far, shared) = pair(0)?;
        let mut third = Runner::new(&Device::host(), RunnerOptions::default())?;
        let foreign = third.eager(&(), |cx| cx.fill_zero(&shared)).unwrap_err();
        assert!(matches!(foreign, Error::Foreign { .. }), "{foreign}");
        near.eager(&(), |cx| cx.fill_bytes(&shared, 7))?; // freed behind this work
        let far_device = far.device().clone();
        let before = far_device.live_objects().allocated_bytes;
        drop(shared);
        assert_eq!(far_device.live_objects().allocated_bytes, before - 8);
        near.synchronize()?;
        Ok(())
    }
}
