/**
 * What the backward pass reads, kept in host memory in between: copied there when the next layer begins,
 * brought back one layer ahead of its use.
 */
import { type Parcel, receiveFromHost, sendToHost } from "../gpu/transfer.ts";
import type { PooledBuffer } from "../gpu/pool.ts";
import type { Device } from "./device.ts";
import { unscoped } from "./scope.ts";
import type { Tensor } from "./tensor.ts";

/** The layer whose kept tensors leave. */
let leaving: Layer | null = null;

/** The layers of one forward pass. */
export class Offload {
  readonly #least: number;
  #last: Layer | null = null;

  /** @param least bytes of a tensor; smaller ones stay */
  constructor(least: number) {
    this.#least = least;
  }

  /** A layer begins, and the tensors of the one before leave. */
  next(): void {
    this.#last?.leave();
    this.#last = new Layer(this.#least, this.#last);
  }

  /** Runs a part of the layer, whose kept tensors are to leave. */
  part<T>(body: () => T): T {
    return within(this.#last, body);
  }

  /**
   * The forward pass ends.
   * @param stays whether the last layer's tensors stay, since they are read at once
   */
  end(stays: boolean): void {
    if (!stays) this.#last?.leave();
    this.#last = null;
  }
}

/** Runs `body`, whose kept tensors stay on the device: it runs for the backward pass. */
export function staying<T>(body: () => T): T {
  return within(null, body);
}

function within<T>(layer: Layer | null, body: () => T): T {
  const outer = leaving;
  leaving = layer;
  try {
    return body();
  } finally {
    leaving = outer;
  }
}

/** Keeps tensors alive, on the device or in host memory. */
export class Holder {
  /** In host memory. */
  readonly away = new Map<Tensor, Stowed>();
  #here: Tensor[];

  constructor(tensors: readonly Tensor[]) {
    this.#here = [...tensors];
    for (const tensor of tensors) tensor.retain();
    leaving?.add(this);
  }

  get here(): readonly Tensor[] {
    return this.#here;
  }

  leave(tensor: Tensor, stowed: Stowed): void {
    this.away.set(tensor, stowed.use());
    for (const one of this.#here) if (one === tensor) one.release();
    this.#here = this.#here.filter((one) => one !== tensor);
  }

  release(): void {
    for (const tensor of this.#here.splice(0)) tensor.release();
    for (const stowed of this.away.values()) stowed.release();
    this.away.clear();
  }
}

class Layer {
  readonly #least: number;
  /** The layer before, whose turn in the backward pass is next. */
  #before: Layer | null;
  #holders: Holder[] = [];
  readonly #stowed: Stowed[] = [];

  constructor(least: number, before: Layer | null) {
    this.#least = least;
    this.#before = before;
  }

  add(holder: Holder): void {
    this.#holders.push(holder);
  }

  leave(): void {
    const known = new Map<PooledBuffer, Stowed[]>();
    for (const holder of this.#holders.splice(0)) {
      for (const tensor of new Set(holder.here)) {
        const { storage, byteOffset, byteLength } = tensor;
        // Parameters and inputs are not the step's own, and stay.
        if (byteLength < this.#least || !storage.arena?.open) continue;
        const same = known.get(storage) ?? [];
        known.set(storage, same);
        let stowed = same.find(
          ({ from }) => from.byteOffset === byteOffset && from.byteLength === byteLength);
        if (!stowed) {
          stowed = new Stowed(tensor, this);
          same.push(stowed);
          this.#stowed.push(stowed);
        }
        holder.leave(tensor, stowed);
      }
    }
  }

  /** The backward pass has come to this layer: what is missing comes, and what the next one needs. */
  reach(): void {
    this.fetch();
    this.#before?.fetch();
    this.#before = null;
  }

  fetch(): void {
    for (const stowed of this.#stowed) stowed.fetch();
  }
}

/** A tensor in host memory, which comes back at most once. */
class Stowed {
  readonly from: Pick<Tensor, "byteOffset" | "byteLength" | "shape" | "dtype">;
  readonly #device: Device;
  readonly #layer: Layer;
  readonly #parcel: Parcel;
  #users = 0;
  #here: Tensor | null = null;

  constructor(tensor: Tensor, layer: Layer) {
    const { byteOffset, byteLength, shape, dtype } = tensor;
    this.from = { byteOffset, byteLength, shape, dtype };
    this.#device = tensor.device;
    this.#layer = layer;
    this.#parcel = sendToHost(tensor);
  }

  use(): this {
    this.#users++;
    return this;
  }

  /** The same elements on the device, alive until the last user is done. */
  get(): Tensor {
    this.#layer.reach();
    return this.#here!;
  }

  fetch(): void {
    if (this.#here || this.#users === 0) return;
    const { shape, dtype } = this.from;
    const here = unscoped(() => this.#device.empty(shape, dtype));
    receiveFromHost(this.#parcel, here);
    this.#here = here;
  }

  release(): void {
    if (--this.#users > 0) return;
    if (this.#here) this.#here.dispose();
    else this.#parcel.refuse(); // nobody read it
  }
}
