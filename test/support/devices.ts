import { afterAll, describe } from "vitest";
import { type Device, type DeviceOptions, openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "./adapters.ts";

/** Opens another device of the adapter under test; it is destroyed when the block ends. */
export type Open = (options?: Omit<DeviceOptions, "adapter">) => Promise<Device>;

/** Runs a block of tests on every adapter, with a device that they share and a way to open more. */
export async function onEveryAdapter(
  body: (device: Device, open: Open) => void, kind: "lent" | "own" = "lent",
): Promise<void> {
  for (const handle of await testAdapters(kind)) {
    const devices: Device[] = [];
    const open: Open = async (options = {}) => {
      const device = await openDevice({ ...options, adapter: handle });
      devices.push(device);
      return device;
    };
    const shared = await open();
    describe(handle.info.id, () => {
      afterAll(() => devices.forEach((device) => device.destroy()));
      body(shared, open);
    });
  }
}
