import { GpuError } from "./errors.ts";
import type { BufferView } from "./gpu.ts";
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

  constructor(from: Stream, to: Stream, bytes: number) {
    this.from = from;
    this.to = to;
    this.bytes = bytes;
  }

  /** Announces bytes. @returns where they go when they are there */
  announce(): (bytes: ArrayBuffer) => void {
    const content: { bytes: ArrayBuffer | null } = { bytes: null };
    this.#contents.push(content);
    return (bytes) => {
      content.bytes = bytes;
      this.to.wake();
    };
  }

  /** The oldest bytes that nobody has taken, or null where they have not arrived. */
  take(): ArrayBuffer | null {
    const bytes = this.#contents[0]?.bytes ?? null;
    if (bytes) this.#contents.shift();
    return bytes;
  }
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
