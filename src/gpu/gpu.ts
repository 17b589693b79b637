import { unhurried } from "#gpu";
import type { AdapterHandle, AdapterInfo } from "./adapters.ts";
import { DeviceLostError, GpuError, OutOfMemoryError, RankLostError } from "./errors.ts";
import { BufferPool, type PooledBuffer } from "./pool.ts";
import { Profiler } from "./profiler.ts";
import { StagingBuffers } from "./staging.ts";
import { Graph, Stream } from "./stream.ts";

/** A contiguous range of a pooled buffer: what a kernel is bound to. */
export interface BufferView {
  readonly device: Gpu;
  readonly storage: PooledBuffer;
  readonly byteOffset: number;
  readonly byteLength: number;
}

export interface GpuOptions {
  /**
   * "adapter": all that the adapter offers (default);
   * "default": WebGPU's guaranteed limits and no optional feature. The environment variable
   * `KRAIT_LIMITS=default` asks for it where the caller leaves it open.
   */
  limits?: "adapter" | "default";
  /**
   * Optional features and raised limits to do without, one by one, as on an adapter that lacks them:
   * "shader-f16", "subgroups", "timestamp-query", "maxComputeWorkgroupStorageSize" and what else the engine
   * asks for. The environment variable `KRAIT_WITHOUT` lists them, with commas, where the caller leaves it
   * open.
   */
  without?: readonly string[];
  /** Most bytes of storage buffers to hold; default: whatever the driver gives. */
  poolCeilingBytes?: number;
}

const LOSS_PATIENCE_MS = 250;
/** Buffers kept for reading back: a decode or training step reads fewer kinds. */
const STAGING_KEPT = 8;

/** One GPU device with its memory, its order of work and its failures. */
export class Gpu {
  readonly info: AdapterInfo;
  readonly gpuDevice: GPUDevice;
  readonly pool: BufferPool;
  readonly stream: Stream;
  /** The first failure; every later use of the device throws it. */
  failure: Error | null = null;
  /** The number of the rank that it is, where there is one device for each. */
  rank: number | null = null;
  /** Devices that share its fate, itself among them. */
  #joined = new Set<Gpu>([this]);
  readonly #failed: Promise<never>;
  #reject!: (error: Error) => void;
  #bindGroups = new Map<string, GPUBindGroup>();
  #destroyed = false;

  constructor(device: GPUDevice, info: AdapterInfo, options: GpuOptions = {}) {
    this.gpuDevice = device;
    this.info = info;
    this.#failed = new Promise<never>((_, reject) => {
      this.#reject = reject;
    });
    this.#failed.catch(() => {}); // the failure is thrown where the device is used next
    const fail = (error: Error) => this.#fail(error);
    this.pool = new BufferPool(device, options.poolCeilingBytes ?? Infinity, fail);
    this.stream = new Stream(device, this.pool, fail, (work) => this.#patiently(work));
    this.#staging = new StagingBuffers(device);
    this.pool.onDestroy = () => this.#bindGroups.clear();
    this.pool.settled = () => this.stream.idle();
    device.lost.then((lost) => this.#fail(new DeviceLostError(lost.reason, lost.message)), () => {});
    device.addEventListener("uncapturederror", (event) => {
      const { error } = event as GPUUncapturedErrorEvent;
      const isMemory = error.constructor.name === "GPUOutOfMemoryError";
      this.#fail(isMemory ? new OutOfMemoryError(error.message, 0, 0) : new GpuError(error.message));
    });
  }

  /** Subgroup operations may be used. */
  get hasSubgroups(): boolean {
    return this.gpuDevice.features.has("subgroups");
  }

  /**
   * Shares the fate of another device, and of those that it was joined to before: the failure of one, which
   * the others may wait for, is that of all.
   */
  join(other: Gpu): void {
    if (this.#joined === other.#joined) return;
    for (const gpu of other.#joined) {
      this.#joined.add(gpu);
      gpu.#joined = this.#joined;
    }
  }

  /** Throws the device's failure, if it has failed. */
  assertUsable(): void {
    if (this.failure) throw this.failure;
  }

  /** A bind group for these buffers, made once and kept while they live. */
  bindGroup(
    key: string, layout: GPUBindGroupLayout, views: readonly { binding: number; view: BufferView }[],
  ): GPUBindGroup {
    let full = key;
    for (const { view } of views) full += `|${view.storage.id}:${view.byteOffset}:${view.byteLength}`;
    const cached = this.#bindGroups.get(full);
    if (cached) return cached;
    const group = this.gpuDevice.createBindGroup({
      layout,
      entries: views.map(({ binding, view }) => ({
        binding,
        resource: {
          buffer: view.storage.buffer, offset: view.byteOffset,
          size: Math.max(16, Math.ceil(view.byteLength / 4) * 4),
        },
      })),
    });
    this.bindGroupsCreated++;
    if (this.#bindGroups.size >= 16384) this.#bindGroups.clear();
    this.#bindGroups.set(full, group);
    return group;
  }

  /** Bind groups ever created: constant in a steady state. */
  bindGroupsCreated = 0;

  /**
   * Runs everything recorded so far and reads a range back.
   * @returns its bytes
   * @throws DeviceLostError, OutOfMemoryError, ShaderError or GpuError:
   *   the failure of this or any earlier command.
   */
  async readBytes(view: BufferView): Promise<ArrayBuffer> {
    this.assertUsable();
    if (this.stream.capturing) {
      throw new GpuError("Nothing can be read back while a graph is being captured.");
    }
    if (view.byteLength === 0) return new ArrayBuffer(0);
    this.pool.retain(view.storage);
    try {
      await this.settle();
      const size = Math.ceil(view.byteLength / 4) * 4;
      const staging = this.#staging.takeFree(size) ?? this.#staging.create(size);
      const encoder = this.gpuDevice.createCommandEncoder();
      encoder.copyBufferToBuffer(view.storage.buffer, view.byteOffset, staging, 0, size);
      this.gpuDevice.queue.submit([encoder.finish()]);
      const since = performance.now();
      await this.#race(staging.mapAsync(1, 0, size));
      this.waitedMs += performance.now() - since;
      const bytes = staging.getMappedRange(0, size).slice(0, view.byteLength);
      staging.unmap();
      this.#staging.keep(staging, STAGING_KEPT);
      this.assertUsable();
      return bytes;
    } finally {
      this.pool.release(view.storage);
    }
  }

  /** What memory holds now, whatever has been recorded: for a tracer, between two stretches. */
  async peek({ storage, byteOffset, byteLength }: BufferView): Promise<ArrayBuffer> {
    const staging = this.#staging.create(byteLength);
    const encoder = this.gpuDevice.createCommandEncoder();
    encoder.copyBufferToBuffer(storage.buffer, byteOffset, staging, 0, byteLength);
    this.gpuDevice.queue.submit([encoder.finish()]);
    await this.#race(staging.mapAsync(1, 0, byteLength));
    const bytes = staging.getMappedRange(0, byteLength).slice(0);
    staging.destroy();
    return bytes;
  }

  /** Milliseconds spent waiting for values to be read back. */
  waitedMs = 0;
  readonly #staging: StagingBuffers;

  /** Buffers for reading back ever created: constant in a steady state. */
  get stagingCreated(): number {
    return this.#staging.created;
  }

  /** Waits until all recorded work has been submitted. */
  async settle(): Promise<void> {
    await this.#race(this.stream.idle());
    this.assertUsable();
  }

  /** Waits until all recorded work has finished on the GPU. */
  async finish(): Promise<void> {
    await this.settle();
    await this.#race(this.gpuDevice.queue.onSubmittedWorkDone());
    this.assertUsable();
  }

  /**
   * Goes through `step` for the sake of its kernels alone: they begin to compile, and nothing runs or takes
   * memory. What `step` makes must not be used afterwards; a capture inside it captures nothing.
   */
  rehearse(step: () => void): void {
    this.stream.beginCapture();
    this.#rehearsing = true;
    try {
      step();
    } finally {
      this.#rehearsing = false;
      this.stream.dropCapture();
    }
  }

  #rehearsing = false;

  /** Records `step` without running it; `replay` runs it, as often as wanted, on the same buffers. */
  capture<T>(step: () => T): { graph: Graph; result: T } {
    if (this.#rehearsing) return { result: step(), graph: Graph.none };
    this.stream.beginCapture();
    let result: T;
    try {
      result = step();
    } catch (error) {
      this.stream.dropCapture();
      throw error;
    }
    return { graph: this.stream.endCapture(), result };
  }

  replay(graph: Graph): void {
    this.assertUsable();
    this.stream.replay(graph);
  }

  /** Attaches a profiler that times every dispatch from now on; null where the adapter has no timestamps. */
  profile(): Profiler | null {
    if (!this.gpuDevice.features.has("timestamp-query")) return null;
    this.stream.flush();
    this.stream.profiler ??= new Profiler(this.gpuDevice);
    return this.stream.profiler;
  }

  /** Destroys the device and all its memory. Later uses throw DeviceLostError. */
  destroy(): void {
    if (this.#destroyed) return;
    this.#destroyed = true;
    this.#fail(new DeviceLostError("destroyed", "it was closed by its owner."));
    this.gpuDevice.destroy();
  }

  #race<T>(work: Promise<T>): Promise<T> {
    return this.#patiently(Promise.race([work, this.#failed]));
  }

  /** Waits for the driver. @throws the device's failure, where that is behind an error */
  async #patiently<T>(work: Promise<T>): Promise<T> {
    try {
      return await (this.info.isSoftware ? unhurried(work) : work);
    } catch (error) {
      if (this.failure) throw this.failure;
      // A dying device first rejects what is pending, with errors that do not name the cause.
      const patience = new Promise<null>((resolve) => setTimeout(resolve, LOSS_PATIENCE_MS, null));
      const lost = await Promise.race([this.gpuDevice.lost, patience]);
      if (lost) this.#fail(new DeviceLostError(lost.reason, lost.message));
      throw this.failure ?? error;
    }
  }

  #fail(error: Error): void {
    if (this.failure) return;
    const others = [...this.#joined].filter((gpu) => gpu !== this && !gpu.failure);
    const shared = others.length > 0 ? this.#lossBefore(others, error) : error;
    this.failure = error instanceof DeviceLostError ? shared : error;
    this.#reject(this.failure);
    this.stream.stop();
    for (const other of others) other.#fail(shared);
  }

  /** What the failure of this device is to others. */
  #lossBefore(others: readonly Gpu[], error: Error): Error {
    if (error instanceof RankLostError) return error;
    const nameOf = (gpu: Gpu | undefined) =>
      typeof gpu?.rank === "number" ? `rank ${gpu.rank}` : "another device";
    const waiting = others.find(({ stream }) => stream.awaited?.from === this.stream);
    const own = this.stream.awaited;
    const where = waiting
      ? `while ${nameOf(waiting)} waited for ${waiting.stream.awaited!.bytes} bytes from it`
      : own ? `while it waited for ${own.bytes} bytes from ` +
        nameOf([...this.#joined].find(({ stream }) => stream === own.from)) : "";
    return new RankLostError(this.rank, this.info.id, where, error);
  }
}

const WANTED_FEATURES = [
  "shader-f16", "subgroups", "timestamp-query", "chromium-experimental-subgroup-matrix",
];
const WANTED_LIMITS = [
  "maxBufferSize", "maxStorageBufferBindingSize", "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize", "maxComputeInvocationsPerWorkgroup", "maxComputeWorkgroupSizeX",
];

/**
 * Requests a GPUDevice from an adapter, with the optional features the engine can use
 * and the limits asked for.
 * @throws GpuError for a name in `without` that the engine never asks for.
 */
export async function requestGpuDevice(handle: AdapterHandle, options: GpuOptions): Promise<GPUDevice> {
  const wanted = [...WANTED_FEATURES, ...WANTED_LIMITS];
  const without = new Set(options.limits === "default" ? wanted : options.without);
  for (const name of without) {
    if (wanted.includes(name)) continue;
    throw new GpuError(`A device can be opened without ${wanted.join(", ")}, but not without "${name}".`);
  }
  const adapter = await handle.request();
  const requiredLimits: Record<string, number> = {};
  for (const name of WANTED_LIMITS) {
    const value = handle.info.limits[name];
    if (value !== undefined && !without.has(name)) requiredLimits[name] = value;
  }
  const requiredFeatures = WANTED_FEATURES.filter(
    (name) => adapter.features.has(name) && !without.has(name)) as GPUFeatureName[];
  return adapter.requestDevice({ requiredFeatures, requiredLimits });
}
