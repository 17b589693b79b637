import type { BufferView } from "../gpu/gpu.ts";
import type { PooledBuffer } from "../gpu/pool.ts";
import { transfer } from "../gpu/transfer.ts";
import type { Device } from "./device.ts";
import { decodeFloat32, encodeFloat } from "./dtype.ts";
import { DTypeError, ShapeError } from "./errors.ts";
import { sizeOf } from "./ndarray.ts";
import { register } from "./scope.ts";

/**
 * Element types of tensors on the GPU: four bytes wide, or two for the halves f16 and bf16, which lie packed
 * in pairs (element 2 i in the low half of word i) and are decoded to f32 where they are read.
 */
export type TensorDType = "f32" | "i32" | "u32" | "f16" | "bf16";
/** The 16-bit storage formats. */
export type HalfDType = "f16" | "bf16";

export function isHalf(dtype: TensorDType): dtype is HalfDType {
  return dtype === "f16" || dtype === "bf16";
}

/** Whether elements are real numbers, which may have gradients; gradients themselves are f32. */
export function isFloat(dtype: TensorDType): boolean {
  return dtype === "f32" || isHalf(dtype);
}

/** Bytes of `size` elements, in whole words. */
export function storageBytes(size: number, dtype: TensorDType): number {
  return isHalf(dtype) ? Math.ceil(size / 2) * 4 : size * 4;
}

/** The halves' names in files. */
const FILE_DTYPE = { f16: "F16", bf16: "BF16" } as const;

/** How a tensor is made a second time, after whose first use nobody holds its memory; see again.ts. */
export interface Again {
  /** Where the elements began the first time. */
  readonly byteOffset: number;
  /** The same elements; whoever makes them keeps them. */
  make(): Tensor;
}

let lastKey = 0;

/** A new identity for gradients. */
export function nextKey(): number {
  return ++lastKey;
}

/**
 * A contiguous row-major array on a device. Its memory is counted: the scope that made it holds one
 * reference, a tape or a captured graph may hold more (`retain`, `release`), and the last one gives the
 * memory back to the pool.
 */
export class Tensor implements BufferView {
  readonly device: Device;
  readonly storage: PooledBuffer;
  readonly byteOffset: number;
  readonly shape: readonly number[];
  readonly dtype: TensorDType;
  /** Number of elements. */
  readonly size: number;
  /** Identity for gradients: views of the whole tensor share it. */
  readonly key: number;
  /** A gradient is wanted: set on parameters, and by the tape on what depends on them. */
  requiresGrad = false;
  /** Of max(h, 0)^2: the key under which an op that can give the gradient of h itself delivers it. */
  relu2Key: number | null = null;
  /** Set where the backward pass makes the elements again instead of keeping them. Views share it. */
  again: Again | null = null;
  #refs = 1;

  /**
   * Internal: use `device.empty`, `device.zeros` or `device.tensor`. Takes over one reference to `storage`.
   */
  constructor(
    device: Device, storage: PooledBuffer, byteOffset: number, shape: readonly number[], dtype: TensorDType,
    key?: number,
  ) {
    this.device = device;
    this.storage = storage;
    this.byteOffset = byteOffset;
    this.shape = shape;
    this.dtype = dtype;
    this.size = sizeOf(shape);
    this.key = key ?? nextKey();
    register(this);
  }

  get byteLength(): number {
    return storageBytes(this.size, this.dtype);
  }

  /**
   * The same elements under another shape; one extent may be -1. Shares memory and gradient.
   * @throws ShapeError when the element counts differ.
   */
  reshape(shape: readonly number[]): Tensor {
    const known = shape.filter((extent) => extent !== -1).reduce((a, b) => a * b, 1);
    const resolved = shape.map((extent) => (extent === -1 ? this.size / Math.max(known, 1) : extent));
    if (sizeOf(resolved) !== this.size) {
      throw new ShapeError(
        `reshape: [${this.shape}] has ${this.size} elements, which [${shape}] cannot hold.`);
    }
    this.device.pool.retain(this.storage);
    const view = new Tensor(this.device, this.storage, this.byteOffset, resolved, this.dtype, this.key);
    view.requiresGrad = this.requiresGrad;
    view.relu2Key = this.relu2Key;
    view.again = this.again;
    return view;
  }

  /** The leading elements under a shape that is no larger; shares memory, but not the gradient. */
  prefix(shape: readonly number[]): Tensor {
    if (sizeOf(shape) > this.size) {
      throw new ShapeError(`prefix: [${this.shape}] is smaller than [${shape}].`);
    }
    return this.#view(this.byteOffset, shape);
  }

  /**
   * Elements under another shape, from number `first` on, a multiple of 64, or of 128 for halves: what a
   * kernel binds starts at a multiple of 256 bytes. Shares memory, but not the gradient.
   * @throws ShapeError when they do not lie in this tensor, or start elsewhere.
   */
  range(first: number, shape: readonly number[]): Tensor {
    const unit = isHalf(this.dtype) ? 128 : 64;
    if (first % unit !== 0 || first < 0 || first + sizeOf(shape) > this.size) {
      throw new ShapeError(
        `range: expected [${shape}] from a multiple of ${unit} in [${this.shape}], found one from ${first}.`);
    }
    return this.#view(this.byteOffset + 256 / unit * first, shape);
  }

  #view(byteOffset: number, shape: readonly number[]): Tensor {
    this.device.pool.retain(this.storage);
    const view = new Tensor(this.device, this.storage, byteOffset, [...shape], this.dtype);
    view.again = this.again;
    return view;
  }

  retain(): this {
    this.#refs++;
    return this;
  }

  /** Drops one reference; the memory goes back to the pool with the last. */
  release(): void {
    if (--this.#refs === 0) this.free();
    if (this.#refs < 0) {
      throw new Error(`A tensor [${this.shape}] was released more often than it was retained.`);
    }
  }

  /** Gives the memory back: nobody refers to it any more. */
  protected free(): void {
    this.device.pool.release(this.storage);
  }

  /** Gives up the owner's reference, for tensors that no scope owns (parameters, caches). */
  dispose(): void {
    this.release();
  }

  /**
   * Runs what was recorded and reads the elements back; halves as the f32 values they stand for.
   * @throws the device's failure, if there was one.
   */
  async read(): Promise<Float32Array | Int32Array | Uint32Array> {
    const bytes = await this.device.readBytes(this);
    if (isHalf(this.dtype)) {
      return decodeFloat32(FILE_DTYPE[this.dtype], new Uint8Array(bytes)).subarray(0, this.size);
    }
    return this.dtype === "f32"
      ? new Float32Array(bytes)
      : this.dtype === "i32" ? new Int32Array(bytes) : new Uint32Array(bytes);
  }

  /** Reads a tensor of one element. */
  async item(): Promise<number> {
    if (this.size !== 1) throw new ShapeError(`item: expected one element, found [${this.shape}].`);
    return (await this.read())[0]!;
  }

  /**
   * Overwrites the elements from the start with `values`; the copy happens in the device's order of work.
   * Halves round every value to the nearest, ties to even.
   * @throws ShapeError for too many values, or an odd count that would split a pair of halves.
   */
  write(values: Float32Array | Int32Array | Uint32Array): void {
    if (values.length > this.size) {
      throw new ShapeError(`write: [${this.shape}] holds ${this.size} elements, found ${values.length}.`);
    }
    this.device.stream.write(this.storage, this.byteOffset, this.#encoded(values));
  }

  #encoded(values: Float32Array | Int32Array | Uint32Array): Uint8Array {
    if (!isHalf(this.dtype)) return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    if (values.length % 2 !== 0 && values.length !== this.size) {
      throw new ShapeError(
        `write: ${this.dtype} [${this.shape}] takes an even count of values, found ${values.length}.`);
    }
    const padded = new Float32Array(values.length + (values.length % 2));
    padded.set(values);
    return encodeFloat(FILE_DTYPE[this.dtype], padded);
  }

  /** Overwrites the elements with those of another tensor, of any device, of the same size and dtype. */
  copyFrom(other: Tensor): void {
    if (other.dtype !== this.dtype) {
      throw new DTypeError(`copyFrom: expected ${this.dtype} elements, found ${other.dtype}.`);
    }
    if (other.size !== this.size) {
      throw new ShapeError(`copyFrom: expected ${this.size} elements, found [${other.shape}].`);
    }
    if (other.device !== this.device) return transfer(other, [this]);
    this.device.stream.copy(other.storage, other.byteOffset, this.storage, this.byteOffset, this.byteLength);
  }

  /** Sets every element to zero. */
  clear(): void {
    this.device.stream.clear(this.storage, this.byteOffset, this.byteLength);
  }
}
