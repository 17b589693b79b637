import { GpuError } from "./errors.ts";
import { currentLane, type Lane, onLane, type Traffic } from "./lane.ts";
import { type Arena, type BufferPool, type GraphMemory, type PooledBuffer, sizeClass } from "./pool.ts";
import type { ProfileEvent, Profiler } from "./profiler.ts";
import { StagingBuffers } from "./staging.ts";
import type { Parcel } from "./transfer.ts";

const UNIFORM_STRIDE = 256; // the default minUniformBufferOffsetAlignment
const BLOCK_SLOTS = 256;
// Keeps a submission far below the seconds after which browsers reset a device. A dispatch of few workgroups
// is soon done, so a submission may hold more of them.
const COMMANDS_PER_SUBMIT = 64;
const LIGHT_WORKGROUPS = 64;
const LIGHT_PER_COMMAND = 16;
/** Buffers of a size class through which bytes leave at the same time: further ones wait for one of them. */
const SENDING = 4;

/** A compute pipeline that may still be compiling. */
export interface PipelineHandle {
  readonly label: string;
  pipeline: GPUComputePipeline | null;
  readonly ready: Promise<void>;
}

interface UniformBlock {
  readonly buffer: GPUBuffer;
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly group: GPUBindGroup;
  used: number;
}

const NO_OFFSET: readonly [number] = [0];

/** Whose work a command is, for traces. */
interface Owned {
  lane?: Lane | null;
}

type Command = Owned & (
  | {
    kind: "dispatch"; pipeline: PipelineHandle; uniforms: UniformBlock | null; offset: readonly [number];
    workgroups: readonly [number, number, number];
    /** Null during a capture, whose buffers do not exist yet. */
    group: GPUBindGroup | null;
  }
  | { kind: "copy"; from: PooledBuffer; fromOffset: number; to: PooledBuffer; toOffset: number; size: number }
  | { kind: "clear"; buffer: PooledBuffer; offset: number; size: number }
  | { kind: "write"; buffer: PooledBuffer; offset: number; bytes: Uint8Array<ArrayBuffer> }
  | { kind: "send"; buffer: PooledBuffer; offset: number; size: number; parcels: readonly Parcel[] }
  | { kind: "receive"; buffer: PooledBuffer; offset: number; parcel: Parcel }
  /** Does nothing: what follows on its lane is this collective. */
  | { kind: "note"; traffic: Traffic }
);

/** Commands that belong together, as they ran by themselves. */
export interface Stretch {
  readonly lane: Lane | null;
  /** The collective that begins with it. */
  readonly traffic: Traffic | null;
  readonly milliseconds: number;
  /** Whose that is: the host's where the GPU has no timestamps, and where bytes cross between devices. */
  readonly clock: "gpu" | "host";
  /** Kernels and copies one by one, where the GPU has timestamps. */
  readonly kernels: readonly ProfileEvent[];
}

/** Told of every stretch; the next one begins when it is done. */
export type Tracer = (stretch: Stretch) => Promise<void> | void;

/** Work of a capture that is recorded when somebody touches one of its buffers. */
interface Late {
  readonly touched: readonly PooledBuffer[];
  /** Those and more, which stay in memory for it. */
  readonly kept: readonly PooledBuffer[];
  readonly lane: Lane | null;
  readonly record: () => void;
}

/** A recorded step that can be run again: same buffers, same bind groups, no op-level work. */
export class Graph {
  readonly commands: readonly Command[];
  readonly retained: readonly PooledBuffer[];
  readonly arena: Arena;
  readonly blocks: UniformBlock[];
  /** What its own tensors take; parameters, inputs and caches are others'. */
  readonly memory: GraphMemory;
  disposed = false;
  constructor(
    commands: readonly Command[], retained: readonly PooledBuffer[], arena: Arena, blocks: UniformBlock[],
    memory: GraphMemory,
  ) {
    this.commands = commands;
    this.retained = retained;
    this.arena = arena;
    this.blocks = blocks;
    this.memory = memory;
  }
  /** Stands for what a rehearsal would have captured. */
  static get none(): Graph {
    const arena = { open: false, destroyed: true, tenants: [], physicals: [], clock: () => 0 };
    const graph = new Graph([], [], arena, [], { peak: 0, live: 0, total: 0, tensors: 0, buffers: 0 });
    graph.disposed = true;
    return graph;
  }

  /** Launches in one replay. */
  get launches(): number {
    return this.commands.reduce((n, { kind }) => n + (kind === "note" ? 0 : 1), 0);
  }

  /** What passes between ranks in one replay, in order, with the pass that it belongs to. */
  get traffic(): { readonly traffic: Traffic; readonly pass: string }[] {
    return this.commands.flatMap((command) => command.kind !== "note" ? []
      : [{ traffic: command.traffic, pass: command.lane?.pass ?? "" }]);
  }
}

/**
 * The device's order of work. Recording is synchronous and only appends to a list; batches are encoded and
 * submitted in that order as soon as their pipelines are compiled, and pause before bytes of another device
 * that have not arrived. Nothing here waits except `idle`.
 */
export class Stream {
  /** Submissions to the queue so far. */
  submits = 0;
  /** Dispatches recorded or replayed so far. */
  dispatches = 0;
  /** Buffers of parameters ever created: constant in a steady state. */
  blocksCreated = 0;
  profiler: Profiler | null = null;
  /** While there is one, stretches of work run one by one. */
  tracer: Tracer | null = null;
  /** Drops whatever is recorded: ops go through their motions, and nothing is compiled or run. */
  muted = false;

  readonly #device: GPUDevice;
  readonly #pool: BufferPool;
  readonly #fail: (error: Error) => void;
  readonly #patiently: <T>(work: Promise<T>) => Promise<T>;
  readonly #staging: StagingBuffers;
  /** Staging buffers by size class, in use or free. */
  readonly #reserved = new Map<number, number>();
  /** Goes on with the batch that waits for bytes or for a staging buffer. */
  #wake: (() => void) | null = null;
  #awaited: Parcel | null = null;
  #stopped = false;
  readonly uniformLayout: GPUBindGroupLayout;
  readonly #freeBlocks: UniformBlock[] = [];
  #commands: Command[] = [];
  #blocks: UniformBlock[] = [];
  /**
   * The running capture: its arena, the buffers from outside that it uses, retained at their first use, and
   * what makes the bind group of each dispatch.
   */
  #capture: {
    arena: Arena; outside: Set<PooledBuffer>;
    unbound: { command: Command & { kind: "dispatch" }; bind: () => GPUBindGroup }[];
  } | null = null;
  /** What is not recorded yet, by the buffers that it touches. */
  readonly #late = new Map<PooledBuffer, Set<Late>>();
  /** Batches that wait for pipelines or bytes, in order; null when everything recorded was submitted. */
  #waiting: Promise<void> | null = null;

  /** @param patiently waits for the driver, and rejects with the device's failure */
  constructor(
    device: GPUDevice, pool: BufferPool, fail: (error: Error) => void,
    patiently: <T>(work: Promise<T>) => Promise<T>,
  ) {
    this.#device = device;
    this.#pool = pool;
    this.#fail = fail;
    this.#patiently = patiently;
    this.#staging = new StagingBuffers(device);
    this.uniformLayout = device.createBindGroupLayout({
      entries: [{ binding: 0, visibility: 4, buffer: { type: "uniform", hasDynamicOffset: true } }],
    });
  }

  /** True between `beginCapture` and `endCapture`. */
  get capturing(): boolean {
    return this.#capture !== null;
  }

  /**
   * Records one dispatch.
   *
   * @param bind      makes the bind group of the buffers, now or when a capture ends
   * @param uniforms  bytes of the kernel's parameter struct, at most 256
   */
  dispatch(
    pipeline: PipelineHandle, bind: () => GPUBindGroup, uniforms: Uint8Array | null,
    workgroups: readonly [number, number, number], touched: readonly PooledBuffer[],
  ): void {
    let block: UniformBlock | null = null;
    let offset = NO_OFFSET;
    if (uniforms) {
      block = this.#blocks.at(-1) ?? null;
      if (block && endsWith(block, uniforms)) {
        offset = [(block.used - 1) * UNIFORM_STRIDE];
      } else {
        if (!block || block.used === BLOCK_SLOTS) {
          block = this.#freeBlocks.pop() ?? this.#createBlock();
          this.#blocks.push(block);
        }
        offset = [block.used++ * UNIFORM_STRIDE];
        block.bytes.fill(0, offset[0], offset[0] + UNIFORM_STRIDE).set(uniforms, offset[0]);
      }
    }
    const command = {
      kind: "dispatch" as const, pipeline, group: this.#capture ? null : bind(), uniforms: block, offset,
        workgroups,
    };
    this.#capture?.unbound.push({ command, bind });
    this.#record(command, touched);
  }

  copy(from: PooledBuffer, fromOffset: number, to: PooledBuffer, toOffset: number, size: number): void {
    if (size > 0) this.#record({ kind: "copy", from, fromOffset, to, toOffset, size }, [from, to]);
  }

  clear(buffer: PooledBuffer, offset: number, size: number): void {
    if (size > 0) this.#record({ kind: "clear", buffer, offset, size }, [buffer]);
  }

  /**
   * Records an upload; the bytes are copied now.
   * Inside a capture it would upload the same bytes at every replay.
   */
  write(buffer: PooledBuffer, offset: number, bytes: Uint8Array): void {
    if (bytes.byteLength === 0) return;
    const padded = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
    padded.set(bytes);
    this.#record({ kind: "write", buffer, offset, bytes: padded }, [buffer]);
  }

  /** Records that bytes leave for other devices: see `transfer`. */
  send(buffer: PooledBuffer, offset: number, size: number, parcels: readonly Parcel[]): void {
    this.#record({ kind: "send", buffer, offset, size, parcels }, [buffer]);
    this.flush(); // others wait for it
  }

  /** Records that bytes arrive from another device: see `transfer`. */
  receive(buffer: PooledBuffer, offset: number, parcel: Parcel): void {
    this.late([buffer], () => this.#record({ kind: "receive", buffer, offset, parcel }, [buffer]));
  }

  /**
   * Records work that others may overtake: in a capture when somebody touches one of its buffers, at the end
   * at the latest; otherwise now. What waits for bytes of others lets pass what does not need them.
   * @param touched what the work writes, and what it reads that may change
   * @param read what it reads besides
   */
  late(touched: readonly PooledBuffer[], record: () => void, read: readonly PooledBuffer[] = []): void {
    if (!this.#capture || this.muted) return record();
    const late = { touched, kept: [...touched, ...read], lane: currentLane(), record };
    for (const buffer of late.kept) this.#pool.retain(buffer);
    for (const buffer of touched) {
      const others = this.#late.get(buffer);
      if (others) others.add(late);
      else this.#late.set(buffer, new Set([late]));
    }
  }

  /** Notes what follows on the lane that is recorded, for tracers. */
  note(traffic: Traffic): void {
    this.#record({ kind: "note", traffic }, []);
  }

  /** Buffers that bytes leave through ever created: constant in a steady state. */
  get stagingCreated(): number {
    return this.#staging.created;
  }

  /** What it waits for. */
  get awaited(): Parcel | null {
    return this.#awaited;
  }

  /** Looks again for what it waits for. */
  wake(): void {
    const wake = this.#wake;
    this.#wake = null;
    wake?.();
  }

  /** Drops what is recorded and not yet submitted, and what will be: the device has failed. */
  stop(): void {
    this.#stopped = true;
    this.wake();
  }

  /** Submits what was recorded, now or as soon as its pipelines are compiled. */
  flush(): void {
    if (this.#capture || this.#commands.length === 0) return;
    const commands = this.#commands;
    const blocks = this.#blocks;
    this.#commands = [];
    this.#blocks = [];
    this.#reserve(commands);
    this.#enqueue(commands, blocks, true);
  }

  /** Resolves when everything recorded so far has been handed to the queue. */
  async idle(): Promise<void> {
    this.flush();
    while (this.#waiting) await this.#waiting;
  }

  /** Starts recording a step for replay instead of running it. */
  beginCapture(): void {
    this.flush();
    const arena = this.#pool.openArena(() => this.#commands.length);
    this.#capture = { arena, outside: new Set(), unbound: [] };
  }

  /** Ends a capture. @throws OutOfMemoryError when its memory does not fit; the capture is then undone. */
  endCapture(): Graph {
    return this.#endCapture(true);
  }

  /** Ends a capture and drops what it recorded. */
  dropCapture(): void {
    this.disposeGraph(this.#endCapture(false));
  }

  #endCapture(use: boolean): Graph {
    this.#settle([...this.#late.keys()], use);
    const { arena, outside, unbound } = this.#capture!;
    const [commands, blocks] = [this.#commands, this.#blocks];
    this.#capture = null;
    this.#commands = [];
    this.#blocks = [];
    const retained = [...outside];
    try {
      const memory = this.#pool.closeArena(arena, use);
      if (use) {
        for (const { command, bind } of unbound) command.group = bind();
        this.#reserve(commands);
      }
      for (const block of blocks) this.#upload(block);
      return new Graph(commands, retained, arena, blocks, memory);
    } catch (error) {
      for (const buffer of retained) this.#pool.release(buffer);
      this.#pool.destroyArena(arena);
      this.#recycle(blocks);
      throw error;
    }
  }

  /** Runs a captured step again, in order with whatever else is recorded. */
  replay(graph: Graph): void {
    if (graph.disposed) throw new GpuError("This captured graph was disposed and cannot be replayed.");
    if (this.#capture) {
      throw new GpuError("A captured graph cannot be replayed while another one is being captured.");
    }
    this.flush();
    this.#enqueue(graph.commands, [], false);
  }

  /** Gives back what a graph holds. */
  disposeGraph(graph: Graph): void {
    if (graph.disposed) return;
    graph.disposed = true;
    for (const buffer of graph.retained) this.#pool.release(buffer);
    this.#pool.destroyArena(graph.arena);
    // A replay that still waits for a pipeline reads these blocks;
    // what is captured next must not overwrite them.
    const blocks = graph.blocks.splice(0);
    if (this.#waiting) void this.idle().then(() => this.#recycle(blocks));
    else this.#recycle(blocks);
  }

  /** Records what is late with some buffers, or drops it. */
  #settle(buffers: readonly PooledBuffer[], use = true): void {
    for (const late of buffers.flatMap((buffer) => [...this.#late.get(buffer) ?? []])) {
      if (!this.#late.get(late.touched[0]!)?.has(late)) continue; // recorded for another of its buffers
      for (const buffer of late.touched) {
        const others = this.#late.get(buffer)!;
        others.delete(late);
        if (others.size === 0) this.#late.delete(buffer);
      }
      if (use) onLane(late.lane, late.record);
      for (const buffer of late.kept) this.#pool.release(buffer);
    }
  }

  #record(command: Command, touched: readonly PooledBuffer[]): void {
    if (this.muted) return;
    if (this.#late.size > 0) this.#settle(touched);
    command.lane = currentLane();
    this.#commands.push(command);
    if (this.#capture) {
      const { arena, outside } = this.#capture;
      for (const buffer of touched) {
        if (buffer.arena === arena || outside.has(buffer)) continue;
        // Now, not at the end: a tensor freed in between would leave its buffer to whoever asks next.
        this.#pool.retain(buffer);
        outside.add(buffer);
      }
    } else if (this.#commands.length >= COMMANDS_PER_SUBMIT) {
      this.flush();
    }
  }

  /** Makes the staging buffers that commands will need: none is made when they run. */
  #reserve(commands: readonly Command[]): void {
    const wanted = new Map<number, number>();
    for (const command of commands) {
      if (command.kind !== "send") continue;
      const size = sizeClass(command.size);
      wanted.set(size, Math.min(SENDING, (wanted.get(size) ?? 0) + 1));
    }
    for (const [size, count] of wanted) {
      for (let n = this.#reserved.get(size) ?? 0; n < count; n++) {
        this.#staging.keep(this.#staging.create(size));
        this.#reserved.set(size, n + 1);
      }
    }
  }

  #enqueue(commands: readonly Command[], blocks: UniformBlock[], upload: boolean): void {
    const { tracer } = this;
    const end = () => {
      if (upload) this.#recycle(blocks);
    };
    const run = (): Promise<void> | null => {
      if (upload) for (const block of blocks) this.#upload(block);
      if (tracer) return this.#traced(commands, tracer).then(end);
      const at = this.#encode(commands, 0);
      if (at < commands.length) return this.#goOn(commands, at).then(end);
      end();
      return null;
    };
    const compiling: Promise<void>[] = [];
    for (const command of commands) {
      if (command.kind === "dispatch" && !command.pipeline.pipeline) compiling.push(command.pipeline.ready);
    }
    let running: Promise<void | null> | null;
    if (!this.#waiting && compiling.length === 0 && !tracer) {
      running = run();
      if (!running) return;
    } else {
      running = (this.#waiting ?? Promise.resolve()).then(() => Promise.all(compiling)).then(run);
    }
    const waiting: Promise<void> = running
      .catch((error: unknown) => this.#fail(error instanceof Error ? error : new Error(String(error))))
      .then(() => {
        if (this.#waiting === waiting) this.#waiting = null;
      });
    this.#waiting = waiting;
  }

  /** Runs one lane's commands after the other, each when the last are done. */
  async #traced(commands: readonly Command[], tracer: Tracer): Promise<void> {
    const { queue } = this.#device;
    const { profiler } = this;
    for (let from = 0; from < commands.length;) {
      const first = commands[from]!;
      const lane = first.lane ?? null;
      let to = from + 1;
      const isSame = ({ lane: other, kind }: Command) => (other ?? null) === lane && kind !== "note";
      while (to < commands.length && isSame(commands[to]!)) to++;
      const stretch = commands.slice(from, to);
      await queue.onSubmittedWorkDone();
      const seen = profiler?.events.length ?? 0;
      let since = performance.now();
      const at = this.#encode(stretch, 0);
      if (at < stretch.length) {
        const paused = performance.now();
        await this.#goOn(stretch, at);
        since += performance.now() - paused; // what others do is no time of its own
      }
      await queue.onSubmittedWorkDone();
      const hostTime = performance.now() - since;
      await profiler?.settle();
      const kernels = profiler?.events.slice(seen) ?? [];
      const isOnGpu = kernels.length > 0 && stretch.every(({ kind }) => STAMPED.has(kind));
      await tracer({
        lane, traffic: first.kind === "note" ? first.traffic : null, kernels,
        ...(stretch.every(({ kind }) => kind === "note") ? { milliseconds: 0, clock: "gpu" as const }
          : isOnGpu ? { milliseconds: spanOf(kernels), clock: "gpu" as const }
            : { milliseconds: hostTime, clock: "host" as const }),
      });
      from = to;
    }
  }

  /** Runs commands from one on that had to wait. */
  async #goOn(commands: readonly Command[], at: number): Promise<void> {
    while (at < commands.length) {
      const command = commands[at]!;
      this.#awaited = command.kind === "receive" ? command.parcel : null;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
      at = this.#encode(commands, at);
    }
    this.#awaited = null;
  }

  /**
   * Encodes commands in order; state that a pass already has is not set again.
   * @returns the number of the command that has to wait, or that of all of them
   */
  #encode(commands: readonly Command[], start: number): number {
    if (this.#stopped) return commands.length;
    const { profiler } = this;
    // Only a trace wants to know of copies too.
    const timed = this.tracer ? profiler : null;
    const leaving: { staging: GPUBuffer; size: number; deliver: ((bytes: ArrayBuffer) => void)[] }[] = [];
    let encoder: GPUCommandEncoder | null = null;
    let pass: GPUComputePassEncoder | null = null;
    let pipeline: GPUComputePipeline | null = null;
    let group: GPUBindGroup | null = null;
    let uniforms: UniformBlock | null = null;
    let offset = -1;
    let load = 0;
    let copies: GPUComputePassTimestampWrites | null = null;
    const open = () => (encoder ??= this.#device.createCommandEncoder());
    const endPass = () => {
      pass?.end();
      pass = pipeline = group = uniforms = null;
    };
    /** An empty pass, for a timestamp beside copies. */
    const stamp = (timestampWrites: GPUComputePassTimestampWrites) =>
      open().beginComputePass({ timestampWrites }).end();
    const beginCopy = () => {
      endPass();
      if (!timed || copies) return;
      copies = timed.timestamps("copy", [0, 0, 0]);
      const { querySet, beginningOfPassWriteIndex } = copies;
      stamp({ querySet, beginningOfPassWriteIndex: beginningOfPassWriteIndex! });
    };
    const endCopies = () => {
      if (copies) stamp({ querySet: copies.querySet, endOfPassWriteIndex: copies.endOfPassWriteIndex! });
      copies = null;
      if (timed?.full) submit();
    };
    const submit = () => {
      endPass();
      if (copies) endCopies();
      load = 0;
      if (!encoder) return;
      profiler?.resolve(encoder);
      this.#device.queue.submit([encoder.finish()]);
      profiler?.submitted();
      this.submits++;
      encoder = null;
      for (const { staging, size, deliver } of leaving.splice(0)) this.#deliver(staging, size, deliver);
    };
    for (let at = start; at < commands.length; at++) {
      const command = commands[at]!;
      switch (command.kind) {
        case "dispatch": {
          const [x, y, z] = command.workgroups;
          if (copies) endCopies();
          if (profiler) {
            endPass();
            const timestampWrites = profiler.timestamps(command.pipeline.label, command.workgroups);
            pass = open().beginComputePass({ timestampWrites });
          } else {
            pass ??= open().beginComputePass();
          }
          if (pipeline !== command.pipeline.pipeline) pass.setPipeline(pipeline = command.pipeline.pipeline!);
          if (group !== command.group) pass.setBindGroup(0, group = command.group!);
          if (command.uniforms && (uniforms !== command.uniforms || offset !== command.offset[0])) {
            pass.setBindGroup(1, command.uniforms.group, command.offset);
            uniforms = command.uniforms;
            offset = command.offset[0];
          }
          pass.dispatchWorkgroups(x, y, z);
          this.dispatches++;
          load += x * y * z <= LIGHT_WORKGROUPS ? 1 / LIGHT_PER_COMMAND : 1;
          if (load >= COMMANDS_PER_SUBMIT || profiler?.full) submit();
          break;
        }
        case "copy":
          beginCopy();
          open().copyBufferToBuffer(
            command.from.buffer, command.fromOffset, command.to.buffer, command.toOffset, command.size);
          load++;
          break;
        case "clear":
          beginCopy();
          open().clearBuffer(command.buffer.buffer, command.offset, command.size);
          load++;
          break;
        case "note":
          break;
        case "write":
          submit(); // queue writes happen between submissions
          this.#device.queue.writeBuffer(command.buffer.buffer, command.offset, command.bytes);
          break;
        case "send": {
          const staging = this.#staging.takeFree(command.size);
          if (!staging) {
            submit();
            return at;
          }
          endPass();
          open().copyBufferToBuffer(command.buffer.buffer, command.offset, staging, 0, command.size);
          leaving.push({
            staging, size: command.size, deliver: command.parcels.map((parcel) => parcel.announce()),
          });
          if (commands[at + 1]?.kind !== "send") submit();
          break;
        }
        case "receive": {
          submit();
          const bytes = command.parcel.take();
          if (!bytes) return at;
          this.#device.queue.writeBuffer(command.buffer.buffer, command.offset, bytes);
          break;
        }
      }
    }
    submit();
    return commands.length;
  }

  /** Hands bytes out when the device has come to copy them into a staging buffer. */
  #deliver(staging: GPUBuffer, size: number, deliver: readonly ((bytes: ArrayBuffer) => void)[]): void {
    this.#patiently(staging.mapAsync(1, 0, size)).then(() => {
      const bytes = staging.getMappedRange(0, size).slice(0);
      staging.unmap();
      this.#staging.keep(staging);
      for (const one of deliver) one(bytes);
      this.wake(); // it may wait for the buffer
    }).catch((error: unknown) => this.#fail(error instanceof Error ? error : new Error(String(error))));
  }

  #createBlock(): UniformBlock {
    const size = UNIFORM_STRIDE * BLOCK_SLOTS;
    this.blocksCreated++;
    const buffer = this.#device.createBuffer({ size, usage: 0x40 | 0x08 }); // UNIFORM | COPY_DST
    const group = this.#device.createBindGroup({
      layout: this.uniformLayout, entries: [{ binding: 0, resource: { buffer, size: UNIFORM_STRIDE } }],
    });
    return { buffer, bytes: new Uint8Array(size), group, used: 0 };
  }

  #upload(block: UniformBlock): void {
    this.#device.queue.writeBuffer(block.buffer, 0, block.bytes, 0, block.used * UNIFORM_STRIDE);
  }

  #recycle(blocks: UniformBlock[]): void {
    for (const block of blocks) {
      block.used = 0;
      this.#freeBlocks.push(block);
    }
    blocks.length = 0;
  }
}

/** Commands between timestamps; what else there is waits for the host. */
const STAMPED: ReadonlySet<Command["kind"]> = new Set(["dispatch", "copy", "clear", "note"]);

/** Milliseconds from the first start to the last end. */
function spanOf(events: readonly ProfileEvent[]): number {
  const ends = events.map(({ startUs, durationUs }) => startUs + durationUs);
  return (Math.max(...ends) - Math.min(...events.map(({ startUs }) => startUs))) / 1000;
}

/** Whether the last parameters of a block are these. */
function endsWith(block: UniformBlock, uniforms: Uint8Array): boolean {
  if (block.used === 0) return false;
  const at = (block.used - 1) * UNIFORM_STRIDE;
  for (let i = 0; i < uniforms.length; i++) if (block.bytes[at + i] !== uniforms[i]) return false;
  return true;
}
