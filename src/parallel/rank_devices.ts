/** The devices of a layout's ranks. */
import type { AdapterHandle } from "../gpu/adapters.ts";
import { AdapterError } from "../gpu/errors.ts";
import { type Device, type DeviceOptions, listAdapters, openDevice } from "../tensor/device.ts";
import { UsageError } from "../tensor/errors.ts";

/** Where ranks lie: on one device together, on a device each, or on devices of all adapters in turn. */
export const RANKS_ON = ["shared", "devices", "adapters"] as const;
export type RanksOn = (typeof RANKS_ON)[number];

/**
 * Opens the devices of so many ranks, in their order: "shared" gives the same one to all. Devices of several
 * ranks share their fate: the failure of one, which the others may wait for, is that of all.
 *
 * @param adapter part of a name, or one already found; default: the best. Of no use with "adapters".
 * @throws AdapterError where "adapters" finds a single one; UsageError for a world of no ranks, or an adapter
 *   together with "adapters"
 */
export async function openRankDevices(
  world: number, kind: RanksOn, adapter?: string | AdapterHandle,
  options: Omit<DeviceOptions, "adapter"> = {},
): Promise<Device[]> {
  if (!Number.isInteger(world) || world < 1) {
    throw new UsageError(`The ranks of a layout are 1 or more, found ${world}.`);
  }
  if (kind === "shared") {
    const device = await openDevice({ ...options, ...(adapter !== undefined && { adapter }) });
    return Array<Device>(world).fill(device);
  }
  const adapters = kind === "adapters" ? await severalAdapters(adapter) : [adapter];
  const opened = await Promise.allSettled(Array.from({ length: world }, (_, rank) => {
    const chosen = adapters[rank % adapters.length];
    return openDevice({ ...options, ...(chosen !== undefined && { adapter: chosen }) });
  }));
  const devices = opened.flatMap((one) => (one.status === "fulfilled" ? [one.value] : []));
  const failed = opened.find((one) => one.status === "rejected");
  if (failed) {
    for (const device of devices) device.destroy();
    throw failed.reason;
  }
  devices.forEach((device, rank) => {
    device.rank = rank;
    device.join(devices[0]!);
  });
  return devices;
}

async function severalAdapters(adapter: string | AdapterHandle | undefined): Promise<AdapterHandle[]> {
  if (adapter !== undefined) {
    const name = typeof adapter === "string" ? adapter : adapter.info.id;
    throw new UsageError(`Ranks on "adapters" use all of them, but "${name}" was asked for by name.`);
  }
  const found = await listAdapters();
  if (found.length < 2) {
    const names = found.map(({ info }) => `${info.id} (${info.name})`).join(", ") || "none";
    throw new AdapterError(`Ranks on "adapters" need two adapters or more, found: ${names}.`);
  }
  return found;
}
