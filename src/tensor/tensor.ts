import type { BufferView } from "../gpu/gpu.ts";
import type { PooledBuffer } from "../gpu/pool.ts";
import type { Device } from "./device.ts";
import { ShapeError } from "./errors.ts";
import { sizeOf } from "./ndarray.ts";
import { register } from "./scope.ts";

/** Element types of tensors on the GPU; all are four bytes wide. */
export type TensorDType = "f32" | "i32" | "u32";

let nextKey = 1;

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
    this.key = key ?? nextKey++;
    register(this);
  }

  get byteLength(): number {
    return this.size * 4;
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
    return view;
  }

  /** The leading elements under a shape that is no larger; shares memory, but not the gradient. */
  prefix(shape: readonly number[]): Tensor {
    if (sizeOf(shape) > this.size) {
      throw new ShapeError(`prefix: [${this.shape}] is smaller than [${shape}].`);
    }
    this.device.pool.retain(this.storage);
    return new Tensor(this.device, this.storage, this.byteOffset, [...shape], this.dtype);
  }

  retain(): this {
    this.#refs++;
    return this;
  }

  /** Drops one reference; the memory goes back to the pool with the last. */
  release(): void {
    if (--this.#refs === 0) this.device.pool.release(this.storage);
    if (this.#refs < 0) {
      throw new Error(`A tensor [${this.shape}] was released more often than it was retained.`);
    }
  }

  /** Gives up the owner's reference, for tensors that no scope owns (parameters, caches). */
  dispose(): void {
    this.release();
  }

  /**
   * Runs what was recorded and reads the elements back.
   * @throws the device's failure, if there was one.
   */
  async read(): Promise<Float32Array | Int32Array | Uint32Array> {
    const bytes = await this.device.readBytes(this);
    return this.dtype === "f32"
      ? new Float32Array(bytes)
      : this.dtype === "i32" ? new Int32Array(bytes) : new Uint32Array(bytes);
  }

  /** Reads a tensor of one element. */
  async item(): Promise<number> {
    if (this.size !== 1) throw new ShapeError(`item: expected one element, found [${this.shape}].`);
    return (await this.read())[0]!;
  }

  /** Overwrites the elements from the start with `values`; the copy happens in the device's order of work. */
  write(values: Float32Array | Int32Array | Uint32Array): void {
    if (values.length > this.size) {
      throw new ShapeError(`write: [${this.shape}] holds ${this.size} elements, found ${values.length}.`);
    }
    const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    this.device.stream.write(this.storage, this.byteOffset, bytes);
  }

  /** Overwrites the elements with those of another tensor of the same size. */
  copyFrom(other: Tensor): void {
    if (other.size !== this.size) {
      throw new ShapeError(`copyFrom: expected ${this.size} elements, found [${other.shape}].`);
    }
    this.device.stream.copy(other.storage, other.byteOffset, this.storage, this.byteOffset, this.byteLength);
  }

  /** Sets every element to zero. */
  clear(): void {
    this.device.stream.clear(this.storage, this.byteOffset, this.byteLength);
  }
}
