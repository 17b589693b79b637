import { GpuError } from "./errors.ts";
import type { BufferView, Gpu } from "./gpu.ts";
import type { Stream } from "./stream.ts";

/**
 * The way of one recorded transfer: every run of the command that sends puts bytes in, every run of the one
 * that receives takes out the oldest.
 */
export class Parcel {
  readonly from: Stream;
  readonly to: Stream;
  readonly bytes: number;
  /** In the order of sending; null: still on the way. */
  readonly #contents: { bytes: ArrayBuffer | null }[] = [];
  #isRefused = false;

  constructor(from: Stream, to: Stream, bytes: number) {
    this.from = from;
    this.to = to;
    this.bytes = bytes;
  }

  /** Announces bytes. @returns where they go when they are there */
  announce(): (bytes: ArrayBuffer) => void {
    const content: { bytes: ArrayBuffer | null } = { bytes: null };
    if (!this.#isRefused) this.#contents.push(content);
    return (bytes) => {
      content.bytes = bytes;
      this.to.wake();
    };
  }

  /** The oldest bytes that nobody has taken, or null where they have not arrived. */
  take(): ArrayBuffer | Uint8Array<ArrayBuffer> | null {
    const bytes = this.#contents[0]?.bytes ?? null;
    if (bytes) this.#contents.shift();
    return bytes;
  }

  /** Nobody will take what was sent and what will be. */
  refuse(): void {
    this.#isRefused = true;
    this.#contents.length = 0;
  }
}

/**
 * Bytes in host memory that belong to a device: commands of its stream put them there and take them from
 * there, in the order of its work. See `HostMemory.slot`.
 */
export class HostMemory {
  readonly device: Gpu;
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #slots: Slot[] = [];

  constructor(device: Gpu, byteLength: number) {
    this.device = device;
    this.bytes = new Uint8Array(byteLength);
  }

  /** A stretch of the bytes, for `sendToHost` and `receiveFromHost`; slots do not overlap. */
  slot(first: number, length: number): Parcel {
    const slot = new Slot(this.device.stream, this.bytes.subarray(first, first + length));
    this.#slots.push(slot);
    return slot;
  }

  /** Resolves when all that was recorded has arrived. @throws the device's failure */
  async settled(): Promise<void> {
    await this.device.finish();
    while (!this.#slots.every(({ isThere }) => isThere)) {
      await new Promise((resolve) => {
        setTimeout(resolve, 1);
      });
      await this.device.finish();
    }
  }
}

/** A place: what is sent lies there until the next bytes come. */
class Slot extends Parcel {
  readonly #place: Uint8Array<ArrayBuffer>;
  #coming = 0;

  constructor(stream: Stream, place: Uint8Array<ArrayBuffer>) {
    super(stream, stream, place.byteLength);
    this.#place = place;
  }

  get isThere(): boolean {
    return this.#coming === 0;
  }

  override announce(): (bytes: ArrayBuffer) => void {
    this.#coming++;
    return (bytes) => {
      this.#place.set(new Uint8Array(bytes));
      this.#coming--;
      this.to.wake();
    };
  }

  override take(): Uint8Array<ArrayBuffer> | null {
    return this.isThere ? this.#place : null;
  }
}

/** Records that bytes of a device go to host memory. @returns where they are, for `receiveFromHost` */
export function sendToHost(from: BufferView, to?: Parcel): Parcel {
  const { stream } = from.device;
  const parcel = to ?? new Parcel(stream, stream, from.byteLength);
  stream.send(from.storage, from.byteOffset, from.byteLength, [parcel]);
  return parcel;
}

/** Records that bytes in host memory come back: the device goes on behind it when they are there. */
export function receiveFromHost(from: Parcel, to: BufferView): void {
  to.device.stream.receive(to.storage, to.byteOffset, from);
}

/**
 * Records the copying of bytes to memory of other devices, in the order of work of each of them: a device
 * goes on behind it when the bytes are there. They are read once, however many they are for.
 * @throws GpuError where only one of two devices is capturing.
 */
export function transfer(from: BufferView, to: readonly BufferView[]): void {
  const { device, storage, byteOffset, byteLength } = from;
  if (byteLength === 0 || to.length === 0) return;
  device.assertUsable();
  const parcels = to.map(({ device: other }) => {
    other.assertUsable();
    if (other.stream.capturing !== device.stream.capturing) {
      throw new GpuError("A transfer between two devices can be captured on both of them only.");
    }
    device.join(other);
    return new Parcel(device.stream, other.stream, byteLength);
  });
  device.stream.send(storage, byteOffset, byteLength, parcels);
  to.forEach((view, i) => view.device.stream.receive(view.storage, view.byteOffset, parcels[i]!));
}
