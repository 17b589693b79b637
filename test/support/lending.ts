/**
 * GPUDevices that go from one device to the next, with all that they have compiled: most of the time of a
 * run on a software adapter is that of its compilers, and most kernels are wanted by many files. A process
 * that runs several files (vitest.config.ts) keeps what it has opened; each is lent to one device at a time,
 * which has memory, errors and an end of its own. Tests of loss, failure or of opening itself take real ones.
 */
import { existsSync, readFileSync } from "node:fs";
import type { AdapterHandle } from "../../src/gpu/adapters.ts";

interface Kept {
  readonly raw: GPUDevice;
  /** The one that it is lent to, and null between two. */
  tenant: GPUDevice | null;
  /** Resolves when the work of the tenant before has left it. */
  idle: Promise<unknown>;
  /** As long as these are held, Dawn answers with them whoever asks for the same again. */
  readonly pipelines: GPUComputePipeline[];
}

const kept = new Map<string, Kept[]>();

/** The adapter, whose devices are lent. */
export function lending(handle: AdapterHandle): AdapterHandle {
  return {
    info: handle.info,
    async request() {
      const adapter = await handle.request();
      const requestDevice = (wanted?: GPUDeviceDescriptor) => borrow(handle.info.id, adapter, wanted);
      return facade<GPUAdapter>(adapter, { requestDevice });
    },
  };
}

async function borrow(id: string, adapter: GPUAdapter, wanted?: GPUDeviceDescriptor): Promise<GPUDevice> {
  const key = `${id} ${JSON.stringify(wanted)}`;
  const devices = kept.get(key) ?? [];
  kept.set(key, devices);
  const free = devices.find(({ tenant }) => tenant === null);
  if (free) {
    const tenant = lend(free);
    await free.idle;
    return tenant;
  }
  const one: Kept = {
    raw: await adapter.requestDevice(wanted), tenant: null, idle: Promise.resolve(), pipelines: [],
  };
  devices.push(one);
  const drop = () => devices.includes(one) && devices.splice(devices.indexOf(one), 1);
  one.raw.lost.then(drop, drop);
  return lend(one);
}

const MAPS = "/proc/self/maps";
/** Linux allows a process 65530 mappings by default, and every kernel of lavapipe takes dozens. */
const MOST_MAPS = 20_000;

/** Takes back what a file has left open, and begins anew before the process is full. */
export function giveBack(): void {
  for (const devices of kept.values()) for (const { tenant } of devices) tenant?.destroy();
  if (!existsSync(MAPS) || readFileSync(MAPS, "utf8").split("\n").length < MOST_MAPS) return;
  for (const { raw } of [...kept.values()].flat()) raw.destroy();
  kept.clear();
}

function lend(one: Kept): GPUDevice {
  const { raw, pipelines } = one;
  const made: { destroy(): void }[] = [];
  const listeners: [string, EventListener][] = [];
  const keep = <T extends { destroy(): void }>(what: T): T => {
    made.push(what);
    return what;
  };
  let end!: (info: GPUDeviceLostInfo) => void;
  const ended = new Promise<GPUDeviceLostInfo>((resolve) => {
    end = resolve;
  });
  // Once it has ended, as on a device that was destroyed, nothing that is still recorded arrives.
  const whileLent = <A extends unknown[]>(work: (...args: A) => void) => (...args: A): void => {
    if (one.tenant === tenant) work(...args);
  };
  const { queue } = raw;
  const tenant: GPUDevice = facade<GPUDevice>(raw, {
    queue: facade<GPUQueue>(queue, {
      submit: whileLent(queue.submit.bind(queue)), writeBuffer: whileLent(queue.writeBuffer.bind(queue)),
    }),
    lost: Promise.race([ended, raw.lost]),
    createBuffer: (wanted: GPUBufferDescriptor) => keep(raw.createBuffer(wanted)),
    createQuerySet: (wanted: GPUQuerySetDescriptor) => keep(raw.createQuerySet(wanted)),
    async createComputePipelineAsync(wanted: GPUComputePipelineDescriptor) {
      const pipeline = await raw.createComputePipelineAsync(wanted);
      pipelines.push(pipeline);
      return pipeline;
    },
    addEventListener(type: string, listener: EventListener) {
      listeners.push([type, listener]);
      raw.addEventListener(type, listener);
    },
    destroy() {
      if (one.tenant !== tenant) return;
      one.tenant = null;
      for (const [type, listener] of listeners) raw.removeEventListener(type, listener);
      for (const each of made) each.destroy();
      end({ reason: "destroyed", message: "It was given back." } as GPUDeviceLostInfo);
      one.idle = raw.queue.onSubmittedWorkDone().catch(() => {});
    },
  });
  one.tenant = tenant;
  return tenant;
}

/** An object that is `real` but for `own`; what is set on it stays its own. */
function facade<T extends object>(real: T, own: Record<string, unknown>): T {
  return new Proxy(Object.assign(Object.create(real) as T, own), {
    get(target, name) {
      if (Object.hasOwn(target, name)) return Reflect.get(target, name) as unknown;
      const value = Reflect.get(real, name, real) as unknown;
      return typeof value === "function" ? value.bind(real) as unknown : value;
    },
  });
}
