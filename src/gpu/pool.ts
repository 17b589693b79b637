import { OutOfMemoryError } from "./errors.ts";

const USAGE = 0x80 | 0x04 | 0x08; // STORAGE | COPY_SRC | COPY_DST: the constants are no globals in Node

/** One GPU buffer of the pool. `size` is its class size in bytes, at least what was asked for. */
export interface PooledBuffer {
  readonly id: number;
  readonly buffer: GPUBuffer;
  readonly size: number;
  /** Tensors and captured graphs that hold it; at zero it goes back to its free list. */
  refs: number;
  /** The captured graph whose private memory it is, if any. */
  readonly arena: Arena | null;
}

/**
 * Private memory of a captured graph: what the capture freed may be reused inside the capture,
 * and by nobody else.
 */
export interface Arena {
  open: boolean;
  destroyed: boolean;
  readonly buffers: PooledBuffer[];
  readonly free: Map<number, PooledBuffer[]>;
}

/**
 * Rounds a byte count up to its size class: powers of two up to 64 KiB, then eight classes an octave, so that
 * at most an eighth is wasted on what is large. Creating a buffer costs up to 0.75 ms on a software driver;
 * reuse costs nothing.
 */
export function sizeClass(bytes: number): number {
  if (bytes <= 256) return 256;
  const octave = 2 ** Math.ceil(Math.log2(bytes));
  if (octave <= 65536) return octave;
  const step = octave / 16;
  return Math.ceil(bytes / step) * step;
}

/** Hands out storage buffers and takes them back. Freed buffers wait in lists by size; nothing is zeroed. */
export class BufferPool {
  /** Bytes of buffers in use. */
  liveBytes = 0;
  /** Largest `liveBytes` since the last `resetPeak`. */
  peakBytes = 0;
  /** Bytes of all buffers created and not yet destroyed, in use or waiting. */
  heldBytes = 0;
  /** Buffers ever created: constant in a steady state. */
  created = 0;
  /** Called before buffers are destroyed, so that bind groups naming them are dropped. */
  onDestroy: () => void = () => {};
  /** Resolves when all recorded work has been submitted; only then may its buffers be destroyed. */
  settled: () => Promise<void> = () => Promise.resolve();

  readonly device: GPUDevice;
  /** Most bytes this pool may hold. */
  ceilingBytes: number;
  readonly #maxBuffer: number;
  readonly #onFailure: (error: Error) => void;
  readonly #free = new Map<number, PooledBuffer[]>();
  #arena: Arena | null = null;
  #nextId = 1;

  constructor(device: GPUDevice, ceilingBytes: number, onFailure: (error: Error) => void) {
    this.device = device;
    this.ceilingBytes = ceilingBytes;
    const largest = Math.min(device.limits.maxBufferSize, device.limits.maxStorageBufferBindingSize);
    this.#maxBuffer = largest - (largest % 256); // a size class is a multiple of 256
    this.#onFailure = onFailure;
  }

  /**
   * Takes a buffer of at least `bytes`, with uninitialised contents.
   * @throws OutOfMemoryError over the largest binding of the device or over the pool's ceiling.
   */
  allocate(bytes: number): PooledBuffer {
    if (bytes > this.#maxBuffer) {
      throw new OutOfMemoryError(
        `A tensor of ${bytes} bytes was asked for, ` +
        `but the largest buffer this device can bind is ${this.#maxBuffer} bytes.`,
        bytes, this.#maxBuffer);
    }
    const size = Math.min(sizeClass(bytes), this.#maxBuffer);
    const waiting = (this.#arena ? this.#arena.free : this.#free).get(size)?.pop();
    const taken = waiting ?? this.#create(size, bytes);
    taken.refs = 1;
    this.liveBytes += size;
    this.peakBytes = Math.max(this.peakBytes, this.liveBytes);
    return taken;
  }

  retain(buffer: PooledBuffer): void {
    buffer.refs++;
  }

  release(buffer: PooledBuffer): void {
    if (buffer.arena?.destroyed) return; // its memory went with the graph
    if (--buffer.refs > 0) return;
    if (buffer.refs < 0) throw new Error(`Buffer ${buffer.id} was released more often than it was retained.`);
    this.liveBytes -= buffer.size;
    if (buffer.arena && !buffer.arena.open) return; // waits for its graph
    const lists = buffer.arena ? buffer.arena.free : this.#free;
    const list = lists.get(buffer.size);
    if (list) list.push(buffer);
    else lists.set(buffer.size, [buffer]);
  }

  /** Starts giving out memory that belongs to a captured graph until `closeArena`. */
  openArena(): Arena {
    if (this.#arena) throw new Error("A capture is already in progress on this device.");
    this.#arena = { open: true, destroyed: false, buffers: [], free: new Map() };
    return this.#arena;
  }

  closeArena(arena: Arena): void {
    arena.open = false;
    this.#arena = null;
  }

  /** Destroys a graph's private memory. Tensors that still point into it become invalid. */
  destroyArena(arena: Arena): void {
    arena.destroyed = true;
    this.onDestroy();
    for (const buffer of arena.buffers) {
      if (buffer.refs > 0) this.liveBytes -= buffer.size;
      buffer.refs = 0;
      this.#destroy(buffer);
    }
    arena.buffers.length = 0;
    arena.free.clear();
  }

  /** Destroys every waiting buffer; returns the bytes given back. */
  trim(): number {
    let bytes = 0;
    this.onDestroy();
    for (const list of this.#free.values()) {
      for (const buffer of list) {
        bytes += buffer.size;
        this.#destroy(buffer);
      }
    }
    this.#free.clear();
    return bytes;
  }

  resetPeak(): void {
    this.peakBytes = this.liveBytes;
  }

  #destroy(buffer: PooledBuffer): void {
    this.heldBytes -= buffer.size;
    this.settled().then(() => buffer.buffer.destroy(), () => {});
  }

  #create(size: number, asked: number): PooledBuffer {
    if (this.heldBytes + size > this.ceilingBytes) this.trim();
    if (this.heldBytes + size > this.ceilingBytes) {
      const available = Math.max(0, this.ceilingBytes - this.heldBytes);
      throw new OutOfMemoryError(
        `A tensor of ${asked} bytes was asked for, but only ${available} bytes are left under the pool's ` +
        `ceiling of ${this.ceilingBytes} bytes.`, asked, available);
    }
    this.device.pushErrorScope("out-of-memory");
    const buffer = this.device.createBuffer({ size, usage: USAGE });
    this.device.popErrorScope().then((error) => {
      if (error) {
        this.#onFailure(new OutOfMemoryError(
          `The driver could not allocate ${size} bytes (${this.heldBytes} bytes are already held).`,
          size, 0));
      }
    }, () => {}); // a lost device reports itself
    this.heldBytes += size;
    this.created++;
    const pooled: PooledBuffer = { id: this.#nextId++, buffer, size, refs: 0, arena: this.#arena };
    this.#arena?.buffers.push(pooled);
    return pooled;
  }
}
