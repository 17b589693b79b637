const CAPACITY = 512; // dispatches per resolve; a query set holds two timestamps each

/** One timed dispatch, or copies in a row: microseconds on the GPU's own clock. */
export interface ProfileEvent {
  /** The kernel; "copy" of copies and clears. */
  readonly name: string;
  /** 0 x 0 x 0 of copies. */
  readonly workgroups: readonly [number, number, number];
  readonly startUs: number;
  readonly durationUs: number;
}

/**
 * Times every dispatch with timestamp queries. While it is attached each dispatch gets a compute pass of its
 * own, so the whole runs a little slower than without.
 */
export class Profiler {
  readonly events: ProfileEvent[] = [];
  readonly #device: GPUDevice;
  readonly #querySet: GPUQuerySet;
  readonly #resolved: GPUBuffer;
  #names: { name: string; workgroups: readonly [number, number, number] }[] = [];
  #toRead: {
    staging: GPUBuffer; names: { name: string; workgroups: readonly [number, number, number] }[];
  } | null = null;
  #reads: Promise<void>[] = [];

  /** @throws Error when the device has no "timestamp-query" feature. */
  constructor(device: GPUDevice) {
    if (!device.features.has("timestamp-query")) {
      throw new Error(
        "Profiling needs the device feature timestamp-query, which this adapter does not offer.");
    }
    this.#device = device;
    this.#querySet = device.createQuerySet({ type: "timestamp", count: 2 * CAPACITY });
    // QUERY_RESOLVE | COPY_SRC
    this.#resolved = device.createBuffer({ size: 16 * CAPACITY, usage: 0x200 | 0x04 });
  }

  /** True when the query set must be resolved before another dispatch. */
  get full(): boolean {
    return this.#names.length === CAPACITY;
  }

  timestamps(name: string, workgroups: readonly [number, number, number]): GPUComputePassTimestampWrites {
    const i = this.#names.length;
    this.#names.push({ name, workgroups });
    return { querySet: this.#querySet, beginningOfPassWriteIndex: 2 * i, endOfPassWriteIndex: 2 * i + 1 };
  }

  /** Copies the timestamps out at the end of a command buffer. */
  resolve(encoder: GPUCommandEncoder): void {
    if (this.#names.length === 0) return;
    const names = this.#names;
    this.#names = [];
    const size = 16 * names.length;
    const staging = this.#device.createBuffer({ size, usage: 0x01 | 0x08 }); // MAP_READ | COPY_DST
    encoder.resolveQuerySet(this.#querySet, 0, 2 * names.length, this.#resolved, 0);
    encoder.copyBufferToBuffer(this.#resolved, 0, staging, 0, size);
    this.#toRead = { staging, names };
  }

  submitted(): void {
    const pending = this.#toRead;
    this.#toRead = null;
    if (!pending) return;
    const read = pending.staging.mapAsync(1).then(() => {
      const times = new BigUint64Array(pending.staging.getMappedRange());
      pending.names.forEach(({ name, workgroups }, i) => {
        const start = times[2 * i]!;
        const end = times[2 * i + 1]!;
        this.events.push({
          name, workgroups, startUs: Number(start / 10n) / 100,
          durationUs: Math.max(0, Number(end - start) / 1000),
        });
      });
      pending.staging.destroy();
    });
    read.catch(() => {}); // a lost device: thrown by `settle`, and where the device is used next
    this.#reads.push(read);
  }

  /** Waits until every timestamp so far has been read. */
  async settle(): Promise<void> {
    while (this.#reads.length > 0) await Promise.all(this.#reads.splice(0));
  }

  /** Total time and count per kernel, the largest first. */
  async summary(): Promise<{ name: string; count: number; totalUs: number }[]> {
    await this.settle();
    const totals = new Map<string, { name: string; count: number; totalUs: number }>();
    for (const { name, durationUs } of this.events) {
      const total = totals.get(name) ?? { name, count: 0, totalUs: 0 };
      total.count++;
      total.totalUs += durationUs;
      totals.set(name, total);
    }
    return [...totals.values()].sort((a, b) => b.totalUs - a.totalUs);
  }

  destroy(): void {
    this.#querySet.destroy();
    this.#resolved.destroy();
  }
}
