import { transfer } from "../gpu/transfer.ts";
import type { Device } from "./device.ts";
import type { Tensor } from "./tensor.ts";

/** x itself where it is on the device, else a copy that arrives there in the order of the device's work. */
export function onDevice(x: Tensor, device: Device): Tensor {
  return onDevices(x, [device])[0]!;
}

/** x on each of the devices, as `onDevice`; those that are the same get the same tensor. */
export function onDevices(x: Tensor, devices: readonly Device[]): Tensor[] {
  const copies = new Map<Device, Tensor>([[x.device, x]]);
  for (const device of devices) {
    if (!copies.has(device)) copies.set(device, device.empty(x.shape, x.dtype));
  }
  transfer(x, [...copies.values()].slice(1));
  return devices.map((device) => copies.get(device)!);
}

/**
 * Runs `body`, which records launches of y's device: in a captured step when somebody wants what they make.
 * @param y what they write
 * @param here what they read and others may change
 * @param arrived what they read besides, copies from other devices among them
 */
export function onArrival(
  y: Tensor, here: readonly Tensor[], arrived: readonly Tensor[], body: () => void,
): void {
  const storages = (xs: readonly Tensor[]) => [...new Set(xs.map(({ storage }) => storage))];
  y.device.stream.late(storages([y, ...here]), body, storages(arrived));
}
