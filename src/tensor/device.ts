import { provider } from "#gpu";
import { type AdapterHandle, chooseAdapter, environment } from "../gpu/adapters.ts";
import { type GpuOptions, Gpu, requestGpuDevice } from "../gpu/gpu.ts";
import { tuneBeside } from "../kernel/tune.ts";
import { type Choices, choicesOf } from "../kernel/tuner.ts";
import { choiceTable, TunerCache } from "../kernel/tuner_cache.ts";
import { ShapeError } from "./errors.ts";
import { sizeOf } from "./ndarray.ts";
import { isHalf, storageBytes, Tensor, type TensorDType } from "./tensor.ts";

export interface DeviceOptions extends GpuOptions {
  /**
   * Part of an adapter's name or its id, such as "swiftshader", or one already found; default: the best one.
   */
  adapter?: string | AdapterHandle;
  /**
   * Which kernels to run where several compute the same. "cached" (default): what was measured here earlier,
   * by `krait tune` for one; "background": the same, and what this device misses is measured beside it, on a
   * device of its own, for those opened later; false: the shipped defaults. The environment variable
   * `KRAIT_TUNER=off` means false.
   */
  tuning?: false | "cached" | "background";
  /** Most milliseconds to measure for in the background; default: 10 s. The next device goes on. */
  tuningBudgetMs?: number;
}

/** Every adapter of this machine or page, each once; empty where there is none. */
export function listAdapters(): Promise<AdapterHandle[]> {
  return provider.listAdapters();
}

/**
 * Opens a device on the best adapter (discrete, integrated, software), or on the one asked for.
 * @throws AdapterError when there is none, or none of that name.
 */
export async function openDevice(options: DeviceOptions = {}): Promise<Device> {
  const wanted = options.adapter;
  const handle = typeof wanted === "object"
    ? wanted
    : chooseAdapter(await listAdapters(), wanted).handle;
  const limits = options.limits ?? (environment("KRAIT_LIMITS") === "default" ? "default" : "adapter");
  const without = options.without ??
    (environment("KRAIT_WITHOUT") ?? "").split(",").map((name) => name.trim()).filter((name) => name !== "");
  const asked = { ...options, limits, without };
  const open = async () => new Device(await requestGpuDevice(handle, asked), handle.info, asked);
  const device = await open();
  const tuning = environment("KRAIT_TUNER") === "off" ? false : options.tuning ?? "cached";
  if (tuning === false) return device;
  const cache = new TunerCache(device);
  device.choices.load(choiceTable(await cache.load()));
  if (tuning === "background") void tuneBeside(device, open, cache, options.tuningBudgetMs);
  return device;
}

/** A GPU device with tensors on it. */
export class Device extends Gpu {
  /** Which of several kernels runs for what. */
  get choices(): Choices {
    return choicesOf(this);
  }

  /** A tensor with uninitialised elements. */
  empty(shape: readonly number[], dtype: TensorDType = "f32"): Tensor {
    this.assertUsable();
    const storage = this.pool.allocate(Math.max(16, storageBytes(sizeOf(shape), dtype)));
    return new Tensor(this, storage, 0, [...shape], dtype);
  }

  /** A tensor of zeros. */
  zeros(shape: readonly number[], dtype: TensorDType = "f32"): Tensor {
    const tensor = this.empty(shape, dtype);
    tensor.clear();
    return tensor;
  }

  /**
   * A tensor with the given elements. The dtype follows the array, but floats may be rounded to the halves
   * f16 and bf16; a plain list becomes `dtype`, f32 by default.
   * @throws ShapeError when the count does not fit the shape.
   */
  tensor(
    values: Float32Array | Int32Array | Uint32Array | readonly number[], shape: readonly number[],
    dtype?: TensorDType,
  ): Tensor {
    if (values.length !== sizeOf(shape)) {
      throw new ShapeError(`tensor: [${shape}] holds ${sizeOf(shape)} elements, found ${values.length}.`);
    }
    let kind = dtype;
    if (values instanceof Float32Array) kind = dtype && isHalf(dtype) ? dtype : "f32";
    else if (values instanceof Int32Array) kind = "i32";
    else if (values instanceof Uint32Array) kind = "u32";
    const array = ArrayBuffer.isView(values) ? values as Float32Array | Int32Array | Uint32Array
      : kind === "i32" ? Int32Array.from(values)
      : kind === "u32" ? Uint32Array.from(values)
      : Float32Array.from(values);
    const tensor = this.empty(shape, kind ?? "f32");
    tensor.write(array);
    return tensor;
  }
}
