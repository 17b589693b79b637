import { OutOfMemoryError } from "./errors.ts";

const USAGE = 0x80 | 0x04 | 0x08; // STORAGE | COPY_SRC | COPY_DST: the constants are no globals in Node

/** What a tensor is stored in: a GPU buffer of the pool, or a place in a captured graph's memory. */
export class PooledBuffer {
  /** Bytes, at least what was asked for. */
  readonly size: number;
  /** The captured graph whose private memory it is, if any. */
  readonly arena: Arena | null;
  /** Tensors and captured graphs that hold it; at zero it goes back to its free list. */
  refs = 0;
  #physical: Physical | null;

  constructor(size: number, arena: Arena | null, physical: Physical | null) {
    this.size = size;
    this.arena = arena;
    this.#physical = physical;
  }

  /** Number of the GPU buffer. Tensors of a graph that are never alive at the same time may share one. */
  get id(): number {
    return this.physical.id;
  }

  get buffer(): GPUBuffer {
    return this.physical.buffer;
  }

  get physical(): Physical {
    if (!this.#physical) throw new Error("The memory of a graph is laid out when its capture ends.");
    return this.#physical;
  }

  place(physical: Physical): void {
    this.#physical = physical;
  }
}

/** A buffer of the driver. */
export interface Physical {
  readonly id: number;
  readonly buffer: GPUBuffer;
  readonly size: number;
}

/**
 * Private memory of a captured graph. While it is open its tensors have no memory yet, only lifetimes, in
 * commands; when it closes they are laid out so that those which never live at the same time share buffers.
 */
export interface Arena {
  open: boolean;
  destroyed: boolean;
  readonly tenants: Tenant[];
  readonly physicals: Physical[];
  /** Commands recorded so far. */
  readonly clock: () => number;
}

interface Tenant {
  readonly place: PooledBuffer;
  /** What the tensor itself takes. */
  readonly bytes: number;
  readonly start: number;
  /** Infinite for what outlives the capture. */
  end: number;
}

/** The memory of a captured graph, in bytes. */
export interface GraphMemory {
  /** What it holds. */
  readonly peak: number;
  /** The largest sum of its tensors alive at one time: no layout can do with less. */
  readonly live: number;
  /** All its tensors together, and their number. */
  readonly total: number;
  readonly tensors: number;
  /** Buffers that they share. */
  readonly buffers: number;
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
  /** The tenant of every place in the open arena. */
  #tenants = new Map<PooledBuffer, Tenant>();
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
    let taken: PooledBuffer;
    if (this.#arena) {
      taken = this.#move(this.#arena, bytes);
    } else {
      const size = Math.min(sizeClass(bytes), this.#maxBuffer);
      taken = this.#free.get(size)?.pop() ?? new PooledBuffer(size, null, this.#create(size, bytes));
    }
    taken.refs = 1;
    this.liveBytes += taken.size;
    this.peakBytes = Math.max(this.peakBytes, this.liveBytes);
    return taken;
  }

  /** Most bytes of one buffer. */
  get largestBytes(): number {
    return this.#maxBuffer;
  }

  retain(buffer: PooledBuffer): void {
    buffer.refs++;
  }

  release(buffer: PooledBuffer): void {
    if (buffer.arena?.destroyed) return; // its memory went with the graph
    if (--buffer.refs > 0) return;
    if (buffer.refs < 0) throw new Error("A buffer was released more often than it was retained.");
    this.liveBytes -= buffer.size;
    if (buffer.arena) {
      const tenant = this.#tenants.get(buffer); // none when the arena is closed: it waits for its graph
      if (tenant) tenant.end = buffer.arena.clock();
      return;
    }
    const list = this.#free.get(buffer.size);
    if (list) list.push(buffer);
    else this.#free.set(buffer.size, [buffer]);
  }

  /** Starts giving out memory that belongs to a captured graph, until `closeArena`. */
  openArena(clock: () => number): Arena {
    if (this.#arena) throw new Error("A capture is already in progress on this device.");
    this.#arena = { open: true, destroyed: false, tenants: [], physicals: [], clock };
    return this.#arena;
  }

  /**
   * Lays the graph's memory out; without `use` it is about to be destroyed, and nothing is.
   * @throws OutOfMemoryError over the pool's ceiling.
   */
  closeArena(arena: Arena, use = true): GraphMemory {
    arena.open = false;
    this.#arena = null;
    this.#tenants.clear();
    const { tenants } = arena;
    if (use) {
      for (const { size, of } of layOut(tenants)) {
        const physical = this.#create(size, size);
        arena.physicals.push(physical);
        for (const { place } of of) place.place(physical);
      }
    }
    const memory: GraphMemory = {
      peak: arena.physicals.reduce((sum, { size }) => sum + size, 0), live: largestLive(tenants),
      total: tenants.reduce((sum, { bytes }) => sum + bytes, 0),
      tensors: tenants.length, buffers: arena.physicals.length,
    };
    return memory;
  }

  /** Destroys a graph's private memory. Tensors that still point into it become invalid. */
  destroyArena(arena: Arena): void {
    arena.destroyed = true;
    this.onDestroy();
    for (const { place } of arena.tenants) {
      if (place.refs > 0) this.liveBytes -= place.size;
      place.refs = 0;
    }
    for (const physical of arena.physicals) this.#destroy(physical);
    arena.tenants.length = arena.physicals.length = 0;
  }

  /** Destroys every waiting buffer; returns the bytes given back. */
  trim(): number {
    let bytes = 0;
    this.onDestroy();
    for (const list of this.#free.values()) {
      for (const buffer of list) {
        bytes += buffer.size;
        this.#destroy(buffer.physical);
      }
    }
    this.#free.clear();
    return bytes;
  }

  resetPeak(): void {
    this.peakBytes = this.liveBytes;
  }

  #destroy({ size, buffer }: Physical): void {
    this.heldBytes -= size;
    this.settled().then(() => buffer.destroy(), () => {});
  }

  /** A new tenant of an open arena. */
  #move(arena: Arena, bytes: number): PooledBuffer {
    const place = new PooledBuffer(Math.max(16, Math.ceil(bytes / 16) * 16), arena, null);
    const tenant: Tenant = { place, bytes, start: arena.clock(), end: Infinity };
    arena.tenants.push(tenant);
    this.#tenants.set(place, tenant);
    return place;
  }

  #create(size: number, asked: number): Physical {
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
    return { id: this.#nextId++, buffer, size };
  }
}

/**
 * Puts tenants into as little memory as can be found quickly: the largest first, each into the smallest
 * buffer that nobody needs while it lives. Two tensors of one launch never share, since both live then.
 */
function layOut(tenants: readonly Tenant[]): { size: number; of: Tenant[] }[] {
  const buffers: { size: number; of: Tenant[] }[] = [];
  for (const tenant of [...tenants].sort((a, b) => b.place.size - a.place.size || a.start - b.start)) {
    const isFree = ({ of }: { of: Tenant[] }) =>
      of.every(({ start, end }) => end <= tenant.start || tenant.end <= start);
    const free = buffers.findLast(isFree); // they are in order of size, and none is smaller than this tenant
    if (free) free.of.push(tenant);
    else buffers.push({ size: tenant.place.size, of: [tenant] });
  }
  return buffers;
}

/** The largest sum of bytes alive at one time. */
function largestLive(tenants: readonly Tenant[]): number {
  const changes = tenants.flatMap(
    ({ start, end, bytes }) => [{ at: start, bytes }, { at: end, bytes: -bytes }])
    .sort((a, b) => a.at - b.at || a.bytes - b.bytes);
  let [live, most] = [0, 0];
  for (const { bytes } of changes) most = Math.max(most, live += bytes);
  return most;
}
