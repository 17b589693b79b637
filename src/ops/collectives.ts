/**
 * What passes between ranks. A collective takes the tensors of a group's ranks, in order, and gives one to
 * each; its backward pass is a collective too:
 *
 *   broadcast        x of the root            backward: the sum over the group, at the root
 *   copy_to          x                        backward: the sum over the group
 *   reduce_from      the sum over the group   backward: the gradient as it is
 *   largest_of       the largest of the group (no backward)
 *   scatter          the own slice            backward: all slices
 *   gather           all slices               backward: the own slice, or the sum over the group of it
 *   reduce_scatter   the own slice of the sum backward: all slices
 *   all_to_all       slice j goes to rank j   backward: the way back
 *   send             x on another rank        backward: the way back
 *
 * Sums add f32 in the order of the ranks, whoever sends what to whom. Spec: Megatron Core's mappings.
 */
import { asCommunication, type Counted, currentLane, type Traffic } from "../gpu/lane.ts";
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import { UsageError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Tensor, TensorDType } from "../tensor/tensor.ts";
import type { Device } from "../tensor/device.ts";
import { onDevice, onDevices } from "../tensor/transfer.ts";
import { copyColumns } from "./elementwise.ts";
import { defineOp } from "./op.ts";
import { inputsOf, MOST, movePieces, outputsOf, partsOf } from "./pieces.ts";

/**
 * How bytes travel: from everyone to everyone who needs them, or from neighbour to neighbour. Of ranks on one
 * device nothing travels; what everybody has for somebody else (all_to_all) goes directly either way.
 */
export const ALGORITHMS = ["direct", "ring"] as const;
export type Algorithm = (typeof ALGORITHMS)[number];

/** Ranks that communicate. */
export interface Group {
  /** The axes that they differ in, such as "tp" or "dp-cp". */
  readonly name: string;
  /** Positions in `Sharded.locals`, group by group: every one once, in the order of the ranks. */
  readonly members: readonly (readonly number[])[];
  readonly algorithm: Algorithm;
}

/** One rank by itself. */
export const ALONE: Group = { name: "none", members: [[0]], algorithm: "direct" };

export type CollectiveKind =
  "broadcast" | "reduce" | "all_reduce" | "all_gather" | "reduce_scatter" | "all_to_all" | "send";

/**
 * One collective of one group as an observer sees it. It is recorded with the work itself, so that graphs
 * list theirs and a trace times them. Ranks are those of the whole layout where a stage of it is at work.
 * Whoever wants what is counted reads the counts before anything else runs, or keeps them (`retain`).
 */
export interface Communication extends Traffic {
  readonly kind: CollectiveKind;
  readonly algorithm: Algorithm;
  /** Bytes that all ranks of the group together send. */
  readonly bytes: number;
  readonly counted?: CountedRows;
}

export interface CountedRows extends Counted {
  readonly counts: readonly Tensor[];
}

/** Called for every collective that is recorded. */
export const communicationObservers = new Set<(communication: Communication) => void>();

/** Whom the tensors of a call belong to. */
export interface Call {
  readonly group: string;
  readonly algorithm: Algorithm;
  readonly ranks: readonly number[];
}

/** Options of the ops below: whom the tensors belong to, and along which dimension they are cut. */
export interface SliceOptions extends Call {
  readonly dim: number;
}

export interface GatherOptions extends SliceOptions {
  /** Whether the ranks use the result differently, so that its gradients have to be summed. */
  readonly sum: boolean;
}

export interface BroadcastOptions extends Call {
  /** Place in the group of the rank whose tensor all others get. */
  readonly root: number;
}

/**
 * Bytes that each of the `g` ranks of a group sends where each holds `bytes` before the collective.
 * @param root place of the rank that has what is broadcast, or gets the sum
 */
export function sentByRank(
  kind: CollectiveKind, algorithm: Algorithm, g: number, bytes: number, root = 0,
): number[] {
  const isRing = algorithm === "ring";
  const last = g - 1;
  const slice = bytes / g;
  const each = (of: (rank: number) => number) => Array.from({ length: g }, (_, rank) => of(rank));
  switch (kind) {
    case "broadcast": return each((rank) =>
      bytes * (isRing ? Number((rank + 1) % g !== root) : rank === root ? last : 0));
    // In a ring a sum travels from the first rank to the last, which keeps the order of additions.
    case "reduce": return each((rank) => bytes * Number(isRing ? rank < last || root < last : rank !== root));
    case "all_reduce": return each((rank) =>
      bytes * (isRing ? Number(rank < last) + Number(rank > 0) : last));
    case "all_gather": return each(() => last * bytes);
    case "reduce_scatter": return each((rank) => (isRing && rank < last ? bytes : last * slice));
    case "all_to_all": return each(() => last * slice);
    case "send": return each((rank) => (rank === 0 ? bytes : 0));
  }
}

/** Bytes that the `g` ranks of a group send together. */
export function bytesSent(kind: CollectiveKind, algorithm: Algorithm, g: number, bytes: number): number {
  return sentByRank(kind, algorithm, g, bytes).reduce((sum, one) => sum + one, 0);
}

/** What lies on a device. */
type Placed = Pick<Tensor, "device">;

/** Tells of a collective between these tensors, before which every rank holds `bytes`. */
export function report(
  kind: CollectiveKind, call: Call, xs: readonly Placed[], bytes: number, backward = false, root = 0,
): void {
  const sent = sentByRank(kind, call.algorithm, call.ranks.length, bytes, root);
  announce(kind, call, xs, sent, backward);
}

/** Shows a collective to the observers, and notes it where it is recorded: on the devices of its tensors. */
export function announce(
  kind: CollectiveKind, { group, algorithm, ranks }: Call, xs: readonly Placed[], sent: readonly number[],
  backward: boolean, counted?: CountedRows,
): void {
  const lane = currentLane();
  const communication: Communication = {
    kind, group, algorithm, ranks: lane?.kind === "communication" ? lane.ranks : ranks, backward, sent,
    bytes: sent.reduce((sum, one) => sum + one, 0), ...(counted && { counted }),
  };
  for (const device of new Set(xs.map((x) => x.device))) device.stream.note(communication);
  for (const observer of communicationObservers) observer(communication);
}

/** A matrix of rows whose columns are cut: everything before the dimension, and from it on. */
function blocks(shape: readonly number[], dim: number): { rows: number; cols: number } {
  return { rows: sizeOf(shape.slice(0, dim)), cols: sizeOf(shape.slice(dim)) };
}

function withExtent(shape: readonly number[], dim: number, extent: number): number[] {
  return shape.map((n, i) => (i === dim ? extent : n));
}

export function checkAlike(op: string, xs: readonly Tensor[]): void {
  const [first] = xs;
  if (!first) throw new UsageError(`${op}: expected the tensors of a group's ranks, found none.`);
  for (const x of xs) check(x.shape.join() === first.shape.join(), op, "x", `[${first.shape.join(", ")}]`, x);
}

function checkSlices(op: string, [x]: readonly Tensor[], dim: number, g: number): void {
  const extent = x!.shape[dim];
  check(extent !== undefined, op, "dim", `below ${x!.shape.length}`, dim);
  check(extent! % g === 0, op, `the extent of dimension ${dim}`, `a multiple of ${g} ranks`, extent!);
}

const WG = 64;

/** ys[j][r, c] = sum (or largest) over xs of x[r, (first + j) * step + c], in order. Ranks of one device. */
function sumColumns(
  xs: readonly Tensor[], { rows, cols }: { rows: number; cols: number }, step: number,
  ys: readonly Tensor[], largest = false,
): void {
  const { size, device, dtype } = ys[0]!;
  const width = size / Math.max(rows, 1);
  const isWide = [cols, step, width].every((n) => n % 4 === 0);
  const unit = isWide ? 4 : 1;
  const parts = partsOf(width / unit, device);
  for (let j = 0; j < ys.length; j += MOST) {
    const outputs = ys.slice(j, j + MOST);
    for (let i = 0; i < xs.length; i += MOST) {
      const inputs = xs.slice(i, i + MOST);
      launch("comm/sum", {
        bind: { ...inputsOf(inputs), ...outputsOf(outputs) },
        params: {
          rows, width: width / unit, cols: cols / unit, first: j * step / unit, step: step / unit, parts,
          inputs: inputs.length, outputs: outputs.length,
        },
        constants: { WG },
        conditions: [
          ...isWide ? ["vec4" as const] : [], ...i > 0 ? ["more" as const] : [],
          ...dtype === "f32" ? [] : ["integers" as const], ...largest ? ["largest" as const] : [],
        ],
        workgroups: [width === 0 ? 0 : Math.ceil((rows * parts) / WG)],
      });
    }
  }
}

const isShared = (xs: readonly Tensor[]): boolean => xs.every(({ device }) => device === xs[0]!.device);

/**
 * What every rank then has of all: `[r][s]` is the tensor of rank s on the device of rank r. From everyone to
 * everyone, or in a ring each from the rank before.
 */
export function circulated(xs: readonly Tensor[], algorithm: Algorithm): Tensor[][] {
  const devices = xs.map(({ device }) => device);
  const here = xs.map((): Tensor[] => []);
  if (algorithm === "direct" || isShared(xs)) {
    xs.forEach((x, s) => onDevices(x, devices).forEach((copy, r) => {
      here[r]![s] = copy;
    }));
    return here;
  }
  const g = xs.length;
  xs.forEach((x, r) => {
    here[r]![r] = x;
  });
  for (let hop = 1; hop < g; hop++) {
    for (let r = 0; r < g; r++) {
      const s = (r - hop + g) % g;
      here[r]![s] = onDevice(here[(r - 1 + g) % g]![s]!, devices[r]!);
    }
  }
  return here;
}

/** What all ranks come to alike: one rank of each device makes it, for all of that device at once. */
function alike(
  devices: readonly Device[], make: (rank: number, count: number) => readonly Tensor[],
): Tensor[] {
  const ys: Tensor[] = [];
  for (const device of new Set(devices)) {
    const ranks = devices.flatMap((one, rank) => (one === device ? [rank] : []));
    make(ranks[0]!, ranks.length).forEach((y, i) => {
      ys[ranks[i]!] = y;
    });
  }
  return ys;
}

/** So many tensors for what comes out. */
function several(count: number, device: Device, shape: readonly number[], dtype: TensorDType): Tensor[] {
  return Array.from({ length: count }, () => device.empty(shape, dtype));
}

/** The sum, or the largest, as often as wanted. */
function sumsOf(xs: readonly Tensor[], count: number, largest = false): Tensor[] {
  const { device, shape, dtype, size } = xs[0]!;
  const ys = several(count, device, shape, dtype);
  sumColumns(xs, { rows: 1, cols: size }, 0, ys, largest);
  return ys;
}

function sumOf(xs: readonly Tensor[], largest = false): Tensor {
  return sumsOf(xs, 1, largest)[0]!;
}

/** The sum on the device of the last rank: it goes from rank to rank, which keeps the order of additions. */
function sumAlong(xs: readonly Tensor[], largest = false): Tensor {
  return xs.reduce((sum, x) => sumOf([onDevice(sum, x.device), x], largest));
}

/** The sum of all ranks' tensors, or the largest, on every rank. */
function summed(xs: readonly Tensor[], algorithm: Algorithm, largest = false): Tensor[] {
  if (algorithm === "direct" || isShared(xs)) {
    const here = circulated(xs, "direct");
    return alike(xs.map(({ device }) => device), (rank, count) =>
      sumsOf(here[rank]!, count, largest));
  }
  const ys = [sumAlong(xs, largest)];
  for (const { device } of [...xs].reverse().slice(1)) ys.unshift(sent(ys[0]!, device));
  return ys;
}

/** Every rank's slice of the sum: in a ring the last rank, who has all of it, hands out the slices. */
function summedSlices(xs: readonly Tensor[], dim: number, algorithm: Algorithm): Tensor[] {
  const g = xs.length;
  const { device, shape, dtype } = xs[0]!;
  if (isShared(xs)) {
    const matrix = blocks(shape, dim);
    const ys = several(g, device, withExtent(shape, dim, shape[dim]! / g), dtype);
    sumColumns(xs, matrix, matrix.cols / g, ys);
    return ys;
  }
  if (algorithm === "ring") {
    const sum = sumAlong(xs);
    return xs.map((x, i) => onDevice(sliceOf(sum, dim, i, g), x.device));
  }
  return xs.map((own, i) => sumOf(xs.map((x) => onDevice(sliceOf(x, dim, i, g), own.device))));
}

/** All ranks' slices side by side, on every rank. */
function allSlices(xs: readonly Tensor[], dim: number, algorithm: Algorithm): Tensor[] {
  const here = circulated(xs, algorithm);
  return alike(xs.map(({ device }) => device), (rank, count) => joined(here[rank]!, dim, count));
}

/** Slices side by side, as often as wanted. */
function joined(xs: readonly Tensor[], dim: number, count = 1): Tensor[] {
  const { device, shape, dtype } = xs[0]!;
  const { rows, cols: width } = blocks(shape, dim);
  const ys = several(count, device, withExtent(shape, dim, xs.length * shape[dim]!), dtype);
  movePieces(xs, ys, { inner: rows, width }, { step: 0, row: width },
    { step: width, row: xs.length * width });
  return ys;
}

/** Slice i of g. */
function sliceOf(x: Tensor, dim: number, i: number, g: number): Tensor {
  const { rows, cols } = blocks(x.shape, dim);
  const width = cols / g;
  const y = x.device.empty(withExtent(x.shape, dim, x.shape[dim]! / g), x.dtype);
  copyColumns(rows, width, { tensor: x, cols, first: i * width }, { tensor: y, cols: width, first: 0 });
  return y;
}

/** Of every rank's tensor the slice that is its own. */
function ownSlices(xs: readonly Tensor[], dim: number): Tensor[] {
  const g = xs.length;
  if (!isShared(xs)) return xs.map((x, i) => sliceOf(x, dim, i, g));
  const { device, shape, dtype } = xs[0]!;
  const { rows, cols } = blocks(shape, dim);
  const ys = several(g, device, withExtent(shape, dim, shape[dim]! / g), dtype);
  movePieces(xs, ys, { inner: rows, width: cols / g }, { step: cols / g, row: cols },
    { step: 0, row: cols / g }, true);
  return ys;
}

/** A gradient for every rank: zeros where an output was not used. */
export function whole(grads: readonly (Tensor | null)[], devices: readonly Tensor["device"][]): Tensor[] {
  const { shape } = grads.find((grad) => grad !== null)!;
  return grads.map((grad, i) => grad ?? devices[i]!.zeros(shape));
}

interface Saved<O> {
  readonly options: O;
  readonly devices: readonly Tensor["device"][];
}

const broadcastFrom = defineOp({
  name: "broadcast",
  forward(ctx, options: BroadcastOptions, ...xs: Tensor[]): Tensor[] {
    checkAlike("broadcast", xs);
    const { root, algorithm } = options;
    check(xs[root] !== undefined, "broadcast", "root", `below ${xs.length}`, root);
    report("broadcast", options, xs, xs[root]!.byteLength, false, root);
    const devices = xs.map(({ device }) => device);
    ctx.save({ options, devices });
    if (algorithm === "direct") return devices.map((device) => sent(xs[root]!, device));
    const ys: Tensor[] = [];
    for (let hop = 0; hop < xs.length; hop++) {
      const place = (root + hop) % xs.length;
      ys[place] = sent(hop === 0 ? xs[root]! : ys[(place - 1 + xs.length) % xs.length]!, devices[place]!);
    }
    return ys;
  },
  backward({ options, devices }: Saved<BroadcastOptions>, grads) {
    const dys = whole(grads, devices);
    const { root, algorithm } = options;
    report("reduce", options, dys, dys[0]!.byteLength, true, root);
    const sum = algorithm === "direct" || isShared(dys)
      ? sumOf(dys.map((dy) => onDevice(dy, devices[root]!))) : onDevice(sumAlong(dys), devices[root]!);
    return [null, ...dys.map((_, i) => (i === root ? sum : null))];
  },
});

const copyTo = defineOp({
  name: "copy_to",
  forward(ctx, options: Call, ...xs: Tensor[]): Tensor[] {
    checkAlike("copy_to", xs);
    ctx.save({ options, devices: xs.map(({ device }) => device) });
    return xs.map((x) => x.prefix(x.shape));
  },
  backward({ options, devices }: Saved<Call>, grads) {
    const dys = whole(grads, devices);
    report("all_reduce", options, dys, dys[0]!.byteLength, true);
    return [null, ...summed(dys, options.algorithm)];
  },
});

const reduceFrom = defineOp({
  name: "reduce_from",
  forward(_ctx, options: Call, ...xs: Tensor[]): Tensor[] {
    checkAlike("reduce_from", xs);
    report("all_reduce", options, xs, xs[0]!.byteLength);
    return summed(xs, options.algorithm);
  },
  backward: (_saved, grads) => [null, ...grads],
});

const largestOf = defineOp({
  name: "largest_of",
  forward(_ctx, options: Call, ...xs: Tensor[]): Tensor[] {
    checkAlike("largest_of", xs);
    report("all_reduce", options, xs, xs[0]!.byteLength);
    return summed(xs, options.algorithm, true);
  },
});

const scatterTo = defineOp({
  name: "scatter",
  forward(ctx, options: SliceOptions, ...xs: Tensor[]): Tensor[] {
    checkAlike("scatter", xs);
    checkSlices("scatter", xs, options.dim, xs.length);
    ctx.save({ options, devices: xs.map(({ device }) => device) });
    return ownSlices(xs, options.dim);
  },
  backward({ options, devices }: Saved<SliceOptions>, grads) {
    const dys = whole(grads, devices);
    report("all_gather", options, dys, dys[0]!.byteLength, true);
    return [null, ...allSlices(dys, options.dim, options.algorithm)];
  },
});

const gatherFrom = defineOp({
  name: "gather",
  forward(ctx, options: GatherOptions, ...xs: Tensor[]): Tensor[] {
    checkAlike("gather", xs);
    report("all_gather", options, xs, xs[0]!.byteLength);
    ctx.save({ options, devices: xs.map(({ device }) => device) });
    return allSlices(xs, options.dim, options.algorithm);
  },
  backward({ options, devices }: Saved<GatherOptions>, grads) {
    const dys = whole(grads, devices);
    if (!options.sum) return [null, ...ownSlices(dys, options.dim)];
    report("reduce_scatter", options, dys, dys[0]!.byteLength, true);
    return [null, ...summedSlices(dys, options.dim, options.algorithm)];
  },
});

const reduceScatter = defineOp({
  name: "reduce_scatter",
  forward(ctx, options: SliceOptions, ...xs: Tensor[]): Tensor[] {
    checkAlike("reduce_scatter", xs);
    checkSlices("reduce_scatter", xs, options.dim, xs.length);
    report("reduce_scatter", options, xs, xs[0]!.byteLength);
    ctx.save({ options, devices: xs.map(({ device }) => device) });
    return summedSlices(xs, options.dim, options.algorithm);
  },
  backward({ options, devices }: Saved<SliceOptions>, grads) {
    const dys = whole(grads, devices);
    report("all_gather", options, dys, dys[0]!.byteLength, true);
    return [null, ...allSlices(dys, options.dim, options.algorithm)];
  },
});

export interface AllToAllOptions extends Call {
  /** The dimension that is cut, 1 or 2 of [B, L, C]; the parts that arrive are joined along the other. */
  readonly cut: 1 | 2;
}

/** Slice j of rank i along `cut` becomes part i of rank j along the other dimension. */
function exchanged(xs: readonly Tensor[], cut: 1 | 2): Tensor[] {
  const g = xs.length;
  if (!isShared(xs)) {
    return xs.map(({ device }, j) =>
      joined(xs.map((x) => onDevice(sliceOf(x, cut, j, g), device)), cut === 1 ? 2 : 1)[0]!);
  }
  const { device, dtype } = xs[0]!;
  const [B, L, C] = xs[0]!.shape as [number, number, number];
  if (cut === 1) {
    const ys = several(g, device, [B, L / g, g * C], dtype);
    movePieces(xs, ys, { blocks: B, inner: L / g, width: C }, { step: (L / g) * C, block: L * C, row: C },
      { step: C, block: L * C, row: g * C });
    return ys;
  }
  const ys = several(g, device, [B, g * L, C / g], dtype);
  movePieces(xs, ys, { blocks: B, inner: L, width: C / g }, { step: C / g, block: L * C, row: C },
    { step: L * (C / g), block: L * C, row: C / g });
  return ys;
}

const allToAll = defineOp({
  name: "all_to_all",
  forward(ctx, options: AllToAllOptions, ...xs: Tensor[]): Tensor[] {
    checkAlike("all_to_all", xs);
    check(xs[0]!.shape.length === 3, "all_to_all", "x", "[B, L, C]", xs[0]!);
    checkSlices("all_to_all", xs, options.cut, xs.length);
    report("all_to_all", options, xs, xs[0]!.byteLength);
    ctx.save({ options, devices: xs.map(({ device }) => device) });
    return exchanged(xs, options.cut);
  },
  backward({ options, devices }: Saved<AllToAllOptions>, grads) {
    const dys = whole(grads, devices);
    report("all_to_all", options, dys, dys[0]!.byteLength, true);
    return [null, ...exchanged(dys, options.cut === 1 ? 2 : 1)];
  },
});

const sendTo = defineOp({
  name: "send",
  forward(ctx, options: Call, x: Tensor, to: Device | null): Tensor {
    const there = to ?? x.device;
    report("send", options, [x, { device: there }], x.byteLength);
    ctx.save({ options, from: x.device });
    return sent(x, there);
  },
  backward({ options, from }: { options: Call; from: Device }, [dy]) {
    if (!dy) return [];
    announce("send", options, [dy, { device: from }], [0, dy.byteLength], true);
    return [null, sent(dy, from)];
  },
});

/** A copy on another rank's device. */
function sent(x: Tensor, to: Device): Tensor {
  const y = to.empty(x.shape, x.dtype);
  y.copyFrom(x);
  return y;
}

/** Runs a collective for every group of the ranks that hold x. A group of one changes nothing. */
function inGroups(x: Tensor, group: Group, run: (call: Call, ...xs: Tensor[]) => Tensor[]): Tensor {
  if (group.members.every(({ length }) => length === 1)) return x;
  return forEachGroup([x], group, (call, [xs]) => run(call, ...xs!));
}

/** Calls `run` for every group with its ranks' tensors of every value, and gathers its results by rank. */
export function forEachGroup(
  values: readonly Tensor[], { name, algorithm, members }: Group,
  run: (call: Call, locals: readonly (readonly Tensor[])[]) => readonly Tensor[],
): Tensor {
  const locals = values.map(localsOf);
  const results: Tensor[] = [];
  for (const ranks of members) {
    const call = { group: name, algorithm, ranks };
    const ys = asCommunication(name, ranks, () =>
      run(call, locals.map((tensors) => ranks.map((rank) => tensors[rank]!))));
    ranks.forEach((rank, i) => {
      results[rank] = ys[i]!;
    });
  }
  return shardedOf(results);
}

/** All ranks of a stage, as one group. */
export function everyRank(x: Tensor): Group {
  return { name: "stage", members: [localsOf(x).map((_, rank) => rank)], algorithm: "direct" };
}

/** What the rank at place `root` of each group has, on all of its ranks. */
export function broadcastInGroup(x: Tensor, group: Group, root: number): Tensor {
  return inGroups(x, group, (call, ...xs) => broadcastFrom({ ...call, root }, ...xs));
}

/** x as it is; the ranks' gradients are summed: x is the same on all of them and used differently. */
export function copyToGroup(x: Tensor, group: Group): Tensor {
  return inGroups(x, group, copyTo);
}

/** The sum over the group on every rank, used alike by all of them. f32 or u32. */
export function sumOverGroup(x: Tensor, group: Group): Tensor {
  return inGroups(x, group, reduceFrom);
}

/** The largest of the group, element by element, on every rank. f32 or u32, without a gradient. */
export function largestInGroup(x: Tensor, group: Group): Tensor {
  return inGroups(x, group, largestOf);
}

/** The own slice of x, which is the same on all ranks. @throws ShapeError where it does not divide */
export function scatterToGroup(x: Tensor, group: Group, dim: number): Tensor {
  return inGroups(x, group, (call, ...xs) => scatterTo({ ...call, dim }, ...xs));
}

/**
 * The slices of all ranks side by side.
 * @param sum whether the ranks use the result differently: their gradients are summed; else they agree
 */
export function gatherFromGroup(x: Tensor, group: Group, dim: number, sum: boolean): Tensor {
  return inGroups(x, group, (call, ...xs) => gatherFrom({ ...call, dim, sum }, ...xs));
}

/** The own slice of the sum over the group. @throws ShapeError where it does not divide */
export function reduceScatterInGroup(x: Tensor, group: Group, dim: number): Tensor {
  return inGroups(x, group, (call, ...xs) => reduceScatter({ ...call, dim }, ...xs));
}

/** [B, L, C]: all positions of some columns ("columns"), or all columns of some positions ("positions"). */
export function exchangeInGroup(x: Tensor, group: Group, keep: "columns" | "positions"): Tensor {
  return inGroups(x, group, (call, ...xs) => allToAll({ ...call, cut: keep === "columns" ? 2 : 1 }, ...xs));
}

/**
 * What every rank of a stage has, on the ranks at the same places in another stage.
 * @param apart how many ranks these are behind
 */
export function sendToStage(x: Tensor, devices: readonly Device[], apart: number): Tensor {
  return shardedOf(localsOf(x).map((local, rank) => asCommunication("pp", [rank, rank + apart], () =>
    sendTo({ group: "pp", algorithm: "direct", ranks: [rank, rank + apart] }, local, devices[rank]!))));
}
