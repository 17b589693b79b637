import { sizeClass } from "./pool.ts";

/** Buffers that bytes are read back through, by size class; kept and used again. */
export class StagingBuffers {
  /** Buffers ever created: constant in a steady state. */
  created = 0;
  readonly #device: GPUDevice;
  readonly #free: GPUBuffer[] = [];

  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /** A free buffer for so many bytes, or null. */
  takeFree(bytes: number): GPUBuffer | null {
    const size = sizeClass(bytes);
    const at = this.#free.findIndex((buffer) => buffer.size === size);
    return at < 0 ? null : this.#free.splice(at, 1)[0]!;
  }

  create(bytes: number): GPUBuffer {
    this.created++;
    return this.#device.createBuffer({ size: sizeClass(bytes), usage: 0x01 | 0x08 }); // MAP_READ | COPY_DST
  }

  /** Takes a buffer back, and of more than `most` free ones destroys the oldest. */
  keep(buffer: GPUBuffer, most = Infinity): void {
    this.#free.push(buffer);
    while (this.#free.length > most) this.#free.shift()!.destroy();
  }
}
