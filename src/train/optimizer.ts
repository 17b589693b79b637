import type { GradientMap } from "../autograd/tape.ts";
import type { BufferView } from "../gpu/gpu.ts";
import type { PooledBuffer } from "../gpu/pool.ts";
import { HostMemory, receiveFromHost, sendToHost } from "../gpu/transfer.ts";
import { placesIn, sizeOfGroup } from "../nn/division.ts";
import {
  adamw, MOMENT_BLOCK, MOMENT_DTYPES, momentElements, type MomentFormat, slabsOf, type Stretch, stretchTable,
} from "../ops/adamw.ts";
import {
  ALONE, everyRank, gatherFromGroup, reduceScatterInGroup, sumOverGroup,
} from "../ops/collectives.ts";
import { scale as scaled } from "../ops/elementwise.ts";
import { clip_scale, global_norm } from "../ops/global_norm.ts";
import { bytesPerElement, type DType } from "../tensor/dtype.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { PART, type Sharing } from "../parallel/model.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Device } from "../tensor/device.ts";
import { isHalf, storageBytes, Tensor, type TensorDType } from "../tensor/tensor.ts";

export interface AdamWOptions {
  /** Decay rates of the two moments. */
  readonly betas: readonly [number, number];
  readonly eps: number;
  /** Decoupled: p -= lr * weight_decay * p. */
  readonly weight_decay: number;
  /** Largest global gradient norm; Infinity: no clipping. */
  readonly clip: number;
  /** Whether a parameter decays, by name; default: see `decays`. */
  readonly decays?: (name: string, parameter: Tensor) => boolean;
  /** How both moments are stored; default "f32". */
  readonly moments?: MomentFormat;
  /** Whether bf16 parameters have f32 masters, as by default, or are rounded at random. */
  readonly master?: "f32" | "none";
  /** Of the random bits of roundings; default 0. */
  readonly seed?: number;
  /** Which ranks share a parameter, by its name; parameters of one buffer are shared alike. Default: none. */
  readonly sharing?: (name: string) => Sharing;
  /** Whether ranks that share parameters divide their update among them; default true. */
  readonly zero?: boolean;
  /**
   * Moments and masters lie in host memory, and come to the device for the update of so many elements at a
   * time; null or left out: they stay on the device. The bits are the same.
   */
  readonly host_elements?: number | null;
}

/** Elements that an update takes from host memory at a time: 4 MiB of every kind of state. */
export const OFFLOAD_ELEMENTS = 2 ** 20;

/** Where a part of the state lies: on a device, or in host memory. */
export type StatePlace = BufferView | HostPlace;
interface HostPlace {
  readonly host: HostMemory;
  readonly byteOffset: number;
  readonly byteLength: number;
}

/** A part of the state that belongs to one parameter of one rank, or to a stretch of it. */
export interface StateEntry {
  readonly place: StatePlace;
  readonly byteLength: number;
  /** `m.NAME` and `v.NAME`; `m_scale.NAME` and `v_scale.NAME` of 8 bits; `low.NAME` of masters. */
  readonly name: string;
  readonly dtype: DType;
  /** That of the rank's parameter where the rank holds the state of all of it, else [elements]. */
  readonly shape: readonly number[];
  /** The rank within its pipeline stage. */
  readonly rank: number;
  /** The first element of the rank's parameter that this is the state of. */
  readonly first: number;
}

/** What an update found; both [1]. */
export interface UpdateOutcome {
  /** The global gradient norm before clipping. */
  readonly norm: Tensor;
  /** The factor of the gradients; -1 where nothing was updated, since the norm or the loss is not finite. */
  readonly scale: Tensor;
}

/** Parameters that lie in one buffer, and what belongs to them, laid out as they are. */
interface Group extends Sharing {
  readonly names: ReadonlySet<string>;
  readonly param: Tensor;
  readonly grad: Tensor;
  /** The part that a rank updates; what follows is laid out like it. */
  readonly own: Tensor;
  readonly m: State;
  readonly v: State;
  /** Low halves of f32 masters. */
  readonly low: State | null;
  /** What is updated at a time: all of `own`, but where the state comes from host memory. */
  readonly buckets: readonly Bucket[];
}

/** Elements of `own` from `first` on, and the stretches in them. */
interface Bucket {
  readonly first: number;
  readonly count: number;
  readonly table: Tensor;
}

/** One kind of state of a group: a tensor on every rank, or host memory of every rank. */
type State = { readonly tensor: Tensor } | {
  readonly hosts: readonly HostMemory[];
  /** Of every bucket and rank. */
  readonly slots: readonly (readonly ReturnType<HostMemory["slot"]>[])[];
  readonly shapes: readonly (readonly number[])[];
  readonly dtype: TensorDType;
};

/** The random stream of the first group's roundings; further groups count on. */
const ROUNDING_STREAM = 0x6f707469;
const BY_ITSELF: Sharing = { group: ALONE, copies: 1 };

/**
 * AdamW over named parameters. All that changes from step to step (learning rate, bias corrections) lies in a
 * small tensor, so that a captured update can be replayed. An update takes one launch for every buffer in
 * which there are parameters: bf16 ones, which have buffers of their own, keep f32 gradients.
 *
 * Of parameters that several ranks hold each rank updates a contiguous part of every buffer, for which alone
 * it keeps moments and masters (ZeRO-1; Rajbhandari et al. 2020), or without `zero` all of them. Both give
 * the same bits, unless something is rounded at random: a rank numbers the elements of its part.
 */
export class AdamW {
  readonly options: AdamWOptions;
  /** Moments, and what belongs to masters, in the order of the parameters. */
  readonly state: readonly StateEntry[];
  /** Where an update finds gradients, by `Tensor.key` of their parameters; zero until they are written. */
  readonly gradients: GradientMap = new Map();
  /** The rank within its stage whose gradient that is, by the same keys. */
  get ranks(): ReadonlyMap<number, number> {
    return this.#ranks;
  }

  readonly #ranks = new Map<number, number>();
  readonly #groups: Group[] = [];
  readonly #hyper: Tensor;

  constructor(parameters: ReadonlyMap<string, Tensor>, options: AdamWOptions) {
    this.options = options;
    const format = options.moments ?? "f32";
    const state = new Map([...parameters.keys()].map((name) => [name, [] as StateEntry[]]));
    this.#hyper = unscoped(() => {
      const [any] = parameters.values();
      const hyper = onRanks(localsOf(any!), ({ device }) => device.zeros([8]));
      for (const members of byBuffer(parameters)) this.#addGroup(members, format, state);
      return hyper;
    });
    this.state = [...parameters.keys()].flatMap((name) => state.get(name)!);
  }

  /** @param members parameters that lie in one buffer, in order */
  #addGroup(
    members: readonly (readonly [string, Tensor])[], format: MomentFormat, state: Map<string, StateEntry[]>,
  ): void {
    const { sharing = () => BY_ITSELF, decays = decaysByDefault, zero = true } = this.options;
    const shared = sharing(members[0]![0]);
    const ranks = localsOf(members[0]![1]);
    const dtype = MOMENT_DTYPES[format];
    const kind = ranks[0]!.dtype;
    const width = kind === "f32" ? 4 : 2;
    const places = members.map(([name, parameter]) => {
      const first = (startOf(parameter) - ranks[0]!.byteOffset) / width;
      return { name, parameter, first, size: parameter.size, decays: decays(name, parameter) };
    });
    const parts = sizeOfGroup(shared.group);
    const end = places.at(-1)!.first + places.at(-1)!.size;
    // What ranks share is cut into equal parts, whose first elements can be bound.
    const size = parts === 1 ? Math.ceil(end / 4) * 4 : Math.ceil(end / (PART * parts)) * PART * parts;
    const param = onRanks(ranks, ({ device, storage, byteOffset }) => {
      device.pool.retain(storage);
      return new Tensor(device, storage, byteOffset, [size], kind);
    });
    const grad = onRanks(ranks, ({ device }) => device.zeros([size]));
    for (const { parameter, first } of places) {
      localsOf(parameter).forEach(({ key, shape }, rank) => {
        this.gradients.set(key, localsOf(grad)[rank]!.range(first, shape));
        this.#ranks.set(key, rank);
      });
    }
    const count = zero ? size / parts : size;
    const starts = placesIn(shared.group).map((place) => (zero ? place * count : 0));
    const masters = kind !== "f32" && this.options.master !== "none";
    // Random roundings count the elements of a launch: those of one that is cut would be others.
    const isCut = format === "f32" && (kind === "f32" || masters);
    const { host_elements = null } = this.options;
    const each = host_elements === null || !isCut ? count : Math.ceil(host_elements / PART) * PART;
    const buckets = Array.from({ length: Math.ceil(count / each) || 1 }, (_, i): Bucket => {
      const [at, most] = [i * each, Math.min(each, count - i * each)];
      return { first: at, count: most, table: stretchTables(ranks, starts.map((start) =>
        places.flatMap(({ first, size: length, decays: decay }) => {
          const from = Math.max(first, start + at);
          const to = Math.min(first + length, start + at + most);
          return from < to ? [{ first: from - start - at, size: to - from, decays: decay }] : [];
        }))) };
    });
    const make = (elements: (count: number) => number, type: TensorDType) =>
      stateOf(ranks, buckets.map((bucket) => elements(bucket.count)), type, host_elements !== null);
    const moments = () => make((n) => momentElements(n, dtype), dtype);
    const [m, v] = [moments(), moments()];
    const low = masters ? make((n) => n / 2, "u32") : null;
    const own = onRanks(localsOf(param), (local, rank) => local.range(starts[rank]!, [count]));
    const names = new Set(members.map(([name]) => name));
    this.#groups.push({ ...shared, names, param, grad, own, m, v, low, buckets });
    for (const { name, first: at, size: length, parameter } of places) {
      starts.forEach((start, rank) => {
        const [from, to] = [Math.max(at, start), Math.min(at + length, start + count)];
        if (from > to || (from === to && length > 0)) return;
        const shape = to - from === length ? parameter.shape : [to - from];
        const place = { rank, first: from - at };
        const local = (of: State) => onRankOf(of, rank);
        const entries = [
          ...momentEntries(local(m), `m.${name}`, from - start, shape, format, place),
          ...momentEntries(local(v), `v.${name}`, from - start, shape, format, place),
        ];
        if (low) entries.push(entryOf(local(low), `low.${name}`, "U16", shape, 2 * (from - start), place));
        state.get(name)!.push(...entries);
      });
    }
  }

  /** Sets the learning rate of update number `step` (from 0; those that were skipped do not count). */
  prepare(step: number, lr: number): void {
    const { eps, weight_decay } = this.options;
    // As the kernel sees them: it forms 1 - beta in f32, and the corrections belong to those values.
    const [beta1, beta2] = this.options.betas.map(Math.fround) as [number, number];
    const corrections = [1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)];
    const values = [lr, beta1, beta2, eps, weight_decay, ...corrections, step];
    this.#hyper.write(Float32Array.from(values));
  }

  /**
   * Records one update of every parameter; one without a gradient counts as zero and still decays. Where the
   * gradient norm or `loss` is not finite, the device leaves parameters and moments as they are.
   * @param gradients by `Tensor.key`; what does not lie in its place in `this.gradients` is copied there
   * @param loss [] or [1]
   */
  update(gradients: GradientMap, loss: Tensor | null = null): UpdateOutcome {
    const reduced = this.reduce(gradients);
    const norm = this.norm(reduced);
    const scale = clip_scale(norm, this.options.clip, loss);
    this.apply(reduced, scale);
    return { norm, scale };
  }

  /**
   * Sums gradients over the ranks that share their parameters, buffer by buffer, the last layers' first.
   * @returns for every buffer the gradients of the part that a rank updates
   */
  reduce(gradients: GradientMap): Tensor[] {
    for (const [key, place] of this.gradients) {
      const gradient = gradients.get(key);
      if (!gradient) place.clear();
      else if (gradient.storage !== place.storage) place.copyFrom(gradient);
    }
    const { zero = true } = this.options;
    const reduced: Tensor[] = [];
    for (let i = this.#groups.length - 1; i >= 0; i--) {
      const { grad, group } = this.#groups[i]!;
      reduced[i] = zero ? reduceScatterInGroup(grad, group, 0) : sumOverGroup(grad, group);
    }
    return reduced;
  }

  /** The norm of what `reduce` gave, over all ranks of the stage, each of which gets it. [1] */
  norm(reduced: readonly Tensor[]): Tensor {
    const isOne = localsOf(reduced[0]!).length === 1 && this.#groups.every(({ copies }) => copies === 1);
    if (isOne) return global_norm(reduced);
    // Every rank takes a part of what its group shares, so that each square is counted once.
    const byCopies = new Map<number, Tensor[]>();
    reduced.forEach((part, i) => {
      const { group, copies, own, param } = this.#groups[i]!;
      const isWhole = own.size === param.size;
      const length = isWhole ? own.size / sizeOfGroup(group) : own.size;
      const places = placesIn(group);
      const slice = onRanks(localsOf(part), (local, rank) =>
        local.range(isWhole ? places[rank]! * length : 0, [length]));
      byCopies.set(copies, [...byCopies.get(copies) ?? [], slice]);
    });
    const norms = [...byCopies].map(([copies, parts]) => {
      const norm = global_norm(parts);
      return copies === 1 ? norm : scaled(norm, 1 / Math.sqrt(copies));
    });
    return global_norm(norms.map((norm) => gatherFromGroup(norm, everyRank(norm), 0, false)));
  }

  /** Updates what every rank has to, and hands it to those that share it. */
  apply(reduced: readonly Tensor[], scale: Tensor): void {
    this.#groups.forEach(({ param, own, m, v, low, buckets, group }, i) => {
      const rounding = { seed: this.options.seed ?? 0, stream: ROUNDING_STREAM + i };
      buckets.forEach(({ first, count, table }, bucket) => scope(() => {
        const part = (x: Tensor) => (count === x.size ? x : x.range(first, [count]));
        const [mHere, vHere] = [fetched(m, bucket), fetched(v, bucket)];
        const lowHere = low && fetched(low, bucket);
        adamw(part(own), part(reduced[i]!), mHere, vHere, table, this.#hyper, scale, lowHere, rounding);
        for (const [state, here] of [[m, mHere], [v, vHere], [low, lowHere]] as const) {
          if (state && here) putBack(state, bucket, here);
        }
      }));
      if (own.size < param.size) wordsOf(param).copyFrom(gatherFromGroup(wordsOf(own), group, 0, false));
    });
  }

  /** Number of the buffer that a parameter lies in, in what `reduce` gives. */
  bufferOf(name: string): number {
    return this.#groups.findIndex(({ names }) => names.has(name));
  }

  /** Sets every gradient to zero. */
  clearGradients(): void {
    for (const { grad } of this.#groups) grad.clear();
  }

  dispose(): void {
    this.#hyper.dispose();
    for (const tensor of this.gradients.values()) tensor.dispose();
    for (const { param, grad, own, m, v, low, buckets } of this.#groups) {
      for (const tensor of [param, grad, own, ...buckets.map(({ table }) => table)]) tensor.dispose();
      for (const state of [m, v, low]) if (state && "tensor" in state) state.tensor.dispose();
    }
  }
}

/** What every rank has made for itself, as one value. It alone owns what was made. */
function onRanks(ranks: readonly Tensor[], make: (local: Tensor, rank: number) => Tensor): Tensor {
  return scope(() => shardedOf(ranks.map(make)));
}

/** The same memory in whole words: halves move in pairs. */
function wordsOf(x: Tensor): Tensor {
  if (!isHalf(x.dtype)) return x;
  return onRanks(localsOf(x), ({ device, storage, byteOffset, size }) => {
    device.pool.retain(storage);
    return new Tensor(device, storage, byteOffset, [size / 2], "u32");
  });
}

/** State of one rank: all of it in one piece. */
type Piece = Tensor | HostMemory;

/** @param sizes elements of every bucket */
function stateOf(
  ranks: readonly Tensor[], sizes: readonly number[], dtype: TensorDType, isOnHost: boolean,
): State {
  if (!isOnHost) return { tensor: onRanks(ranks, ({ device }) => device.zeros([sizes[0]!], dtype)) };
  const lengths = sizes.map((size) => storageBytes(size, dtype));
  const hosts = ranks.map(({ device }) => new HostMemory(device, lengths.reduce((a, b) => a + b, 0)));
  let first = 0;
  const slots = lengths.map((length) => {
    const at = first;
    first += length;
    return hosts.map((host) => host.slot(at, length));
  });
  return { hosts, slots, shapes: sizes.map((size) => [size]), dtype };
}

function onRankOf(state: State, rank: number): Piece {
  return "tensor" in state ? localsOf(state.tensor)[rank]! : state.hosts[rank]!;
}

/** The state of a bucket, on the device. */
function fetched(state: State, bucket: number): Tensor {
  if ("tensor" in state) return state.tensor;
  return shardedOf(state.hosts.map((host, rank) => {
    const here = (host.device as Device).empty(state.shapes[bucket]!, state.dtype);
    receiveFromHost(state.slots[bucket]![rank]!, here);
    return here;
  }));
}

function putBack(state: State, bucket: number, changed: Tensor): void {
  if ("tensor" in state) return;
  localsOf(changed).forEach((local, rank) => sendToHost(local, state.slots[bucket]![rank]));
}

/** The bytes of a part of the state as they are after everything that was recorded. */
export async function readState({ place }: StateEntry): Promise<Uint8Array> {
  const { byteOffset, byteLength } = place;
  if (!("host" in place)) return new Uint8Array(await place.device.readBytes(place));
  await place.host.settled();
  return place.host.bytes.slice(byteOffset, byteOffset + byteLength);
}

/** Overwrites a part of the state. No update may be under way. */
export function writeState({ place }: StateEntry, bytes: Uint8Array): void {
  if ("host" in place) place.host.bytes.set(bytes, place.byteOffset);
  else place.device.stream.write(place.storage, place.byteOffset, bytes);
}

function entryOf(
  piece: Piece, name: string, dtype: DType, shape: readonly number[], byteOffset: number,
  where: Pick<StateEntry, "rank" | "first">,
): StateEntry {
  const byteLength = sizeOf(shape) * bytesPerElement(dtype);
  const place: StatePlace = piece instanceof HostMemory ? { host: piece, byteOffset, byteLength }
    : { device: piece.device, storage: piece.storage, byteOffset, byteLength };
  return { place, byteLength, name, dtype, shape, ...where };
}

/** Tables of the stretches of all ranks, of one shape. */
function stretchTables(ranks: readonly Tensor[], stretches: readonly (readonly Stretch[])[]): Tensor {
  const most = Math.max(...stretches.map((list, rank) => slabsOf(ranks[rank]!.device, list).length));
  return onRanks(ranks, ({ device }, rank) => stretchTable(device, stretches[rank]!, most));
}

/** Where a parameter's moment lies: from element `first` on, and its scales behind all codes. */
function momentEntries(
  piece: Piece, name: string, first: number, shape: readonly number[], format: MomentFormat,
  place: Pick<StateEntry, "rank" | "first">,
): StateEntry[] {
  const entry = (dtype: DType) => entryOf(piece, name, dtype, shape, first * bytesPerElement(dtype), place);
  if (format !== "8bit") return [entry(format === "f32" ? "F32" : "BF16")];
  const words = piece instanceof HostMemory ? piece.bytes.byteLength / 4 : piece.size;
  const blocks = words / (MOMENT_BLOCK / 4 + 1);
  const scales = Math.ceil(sizeOf(shape) / MOMENT_BLOCK);
  const at = blocks * MOMENT_BLOCK + (4 * first) / MOMENT_BLOCK;
  return [entry("U8"), entryOf(piece, name.replace(".", "_scale."), "F32", [scales], at, place)];
}

/** Parameters with those of one buffer side by side, in the order in which they lie there. */
function byBuffer(parameters: ReadonlyMap<string, Tensor>): [string, Tensor][][] {
  const groups = new Map<PooledBuffer, [string, Tensor][]>();
  for (const [name, parameter] of parameters) {
    const { storage } = localsOf(parameter)[0]!;
    const group = groups.get(storage);
    if (group) group.push([name, parameter]);
    else groups.set(storage, [[name, parameter]]);
  }
  return [...groups.values()].map((group) => group.sort(([, a], [, b]) => startOf(a) - startOf(b)));
}

/** Where a parameter begins in its buffer, the same on every rank. */
function startOf(parameter: Tensor): number {
  return localsOf(parameter)[0]!.byteOffset;
}

/** Matrices decay; norms, biases and the scalars of the state space (A_log, D, dt_bias) do not. */
export function decaysByDefault(name: string, parameter: Tensor): boolean {
  return parameter.shape.length > 1 && !name.endsWith("conv1d.weight");
}
