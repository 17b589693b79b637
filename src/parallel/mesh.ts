/**
 * Ranks and their groups. The same ranks form two grids: the attention grid has the axes tp, cp, dp and pp,
 * the expert grid etp, ep, edp and pp, each with its first axis fastest. Experts may thus be spread over
 * ranks that are tensor, context or data parallel elsewhere; a stage holds the same ranks in both grids.
 */
import { UsageError } from "../tensor/errors.ts";

/** Sizes of the axes of both grids; tp * cp * dp = etp * ep * edp, the ranks of a pipeline stage. */
export interface MeshSizes {
  readonly tp: number;
  readonly cp: number;
  readonly dp: number;
  readonly pp: number;
  readonly etp: number;
  readonly ep: number;
  readonly edp: number;
}

export type Axis = keyof MeshSizes;
/** Axes with their sizes, fastest first. */
export type Grid = readonly (readonly [axis: Axis, size: number])[];

/** Kinds of groups within one pipeline stage, with the axes along which their members differ. */
const STAGE_KINDS = {
  "tp": ["tp"], "cp": ["cp"], "dp": ["dp"], "tp-cp": ["tp", "cp"], "dp-cp": ["cp", "dp"],
  "tp-dp-cp": ["tp", "cp", "dp"], "etp": ["etp"], "ep": ["ep"], "edp": ["edp"], "etp-ep": ["etp", "ep"],
} as const satisfies Record<string, readonly Axis[]>;
/** Kinds of groups that reach over stages. */
const PIPELINE_KINDS = {
  "pp": ["pp"], "tp-pp": ["tp", "pp"], "etp-ep-pp": ["etp", "ep", "pp"],
} as const satisfies Record<string, readonly Axis[]>;
const AXES: Readonly<Record<string, readonly Axis[]>> = { ...STAGE_KINDS, ...PIPELINE_KINDS };

export type StageGroupKind = keyof typeof STAGE_KINDS;
/** `embedding`: the first and the last rank of each pipeline; the other ranks are in no such group. */
export type GroupKind = StageGroupKind | keyof typeof PIPELINE_KINDS | "embedding";

const kindsOf = <K extends string>(kinds: Readonly<Record<K, unknown>>) => Object.keys(kinds) as K[];
export const STAGE_GROUP_KINDS: readonly StageGroupKind[] = kindsOf(STAGE_KINDS);
export const GROUP_KINDS: readonly GroupKind[] = [
  ...STAGE_GROUP_KINDS, ...kindsOf(PIPELINE_KINDS), "embedding",
];

export function attentionGrid({ tp, cp, dp, pp }: MeshSizes): Grid {
  return [["tp", tp], ["cp", cp], ["dp", dp], ["pp", pp]];
}

export function expertGrid({ etp, ep, edp, pp }: MeshSizes): Grid {
  return [["etp", etp], ["ep", ep], ["edp", edp], ["pp", pp]];
}

/** Number of all ranks. */
export function worldOf(sizes: MeshSizes): number {
  return ranksPerStage(sizes) * sizes.pp;
}

/** Number of ranks of one pipeline stage: tp * cp * dp. */
export function ranksPerStage({ tp, cp, dp }: MeshSizes): number {
  return tp * cp * dp;
}

/** The ranks of a pipeline stage, ascending: stages lie one behind the other. */
export function stageRanks(sizes: MeshSizes, stage: number): number[] {
  const count = ranksPerStage(sizes);
  return Array.from({ length: count }, (_, local) => stage * count + local);
}

/**
 * Groups of ranks that differ in `axes` alone: one for each combination of the other axes (the grid's first
 * fastest), its members in the order of the grid (the first of `axes` fastest).
 */
export function gridGroups(grid: Grid, axes: readonly Axis[]): number[][] {
  const missing = axes.find((axis) => !grid.some(([name]) => name === axis));
  if (missing !== undefined) {
    const names = grid.map(([name]) => name).join(", ");
    throw new UsageError(`A group of the grid ${names} cannot run along "${missing}".`);
  }
  const offsets = (inside: boolean): number[] => {
    let list = [0];
    let stride = 1;
    for (const [name, size] of grid) {
      if (axes.includes(name) === inside) {
        const [before, step] = [list, stride];
        list = Array.from({ length: size }, (_, i) => before.map((offset) => offset + i * step)).flat();
      }
      stride *= size;
    }
    return list;
  };
  const members = offsets(true);
  return offsets(false).map((base) => members.map((offset) => base + offset));
}

/**
 * All groups of one kind, as lists of ranks. Those of every kind but `embedding` hold each rank exactly once.
 */
export function groupsOf(sizes: MeshSizes, kind: GroupKind): number[][] {
  if (kind === "embedding") {
    return gridGroups(attentionGrid(sizes), ["pp"]).map((pipeline) =>
      pipeline.length === 1 ? pipeline : [pipeline[0]!, pipeline.at(-1)!]);
  }
  const axes = AXES[kind]!;
  const attention = attentionGrid(sizes);
  const inAttention = axes.every((axis) => attention.some(([name]) => name === axis));
  return gridGroups(inAttention ? attention : expertGrid(sizes), axes);
}

/** Groups of one kind within a pipeline stage, as lists of local indices 0..n-1; the same in each stage. */
export function stageGroups(sizes: MeshSizes, kind: StageGroupKind): number[][] {
  return groupsOf({ ...sizes, pp: 1 }, kind);
}

/** Where a rank stands on every axis of both grids. */
export function coordinatesOf(sizes: MeshSizes, rank: number): Readonly<Record<Axis, number>> {
  const world = worldOf(sizes);
  if (!Number.isInteger(rank) || rank < 0 || rank >= world) {
    throw new UsageError(`A rank of this layout must be from 0 to ${world - 1}, found ${rank}.`);
  }
  const found: Record<Axis, number> = { tp: 0, cp: 0, dp: 0, pp: 0, etp: 0, ep: 0, edp: 0 };
  for (const grid of [attentionGrid(sizes), expertGrid(sizes)]) {
    let rest = rank;
    for (const [axis, size] of grid) {
      found[axis] = rest % size;
      rest = Math.floor(rest / size);
    }
  }
  return found;
}

/** The rank at a place of the attention grid. */
export function rankAt(sizes: MeshSizes, place: Readonly<Record<"tp" | "cp" | "dp" | "pp", number>>): number {
  return place.tp + sizes.tp * (place.cp + sizes.cp * (place.dp + sizes.dp * place.pp));
}

/**
 * Checks that two grids lay out the same pipelines: as many ranks, and equal groups along pp. A stage holds
 * attention and experts, so its ranks must be the same ones in both.
 * @throws UsageError that names the first rank whose pipelines differ
 */
export function checkPipelines(attention: Grid, experts: Grid): void {
  const count = (grid: Grid) => grid.reduce((product, [, size]) => product * size, 1);
  const name = (grid: Grid) => grid.map(([axis, size]) => `${axis} = ${size}`).join(", ");
  if (count(attention) !== count(experts)) {
    throw new UsageError(
      `Both grids need the same ranks: expected ${count(attention)} (${name(attention)}), `
      + `found ${count(experts)} (${name(experts)}).`);
  }
  const pipelines = (grid: Grid) => gridGroups(grid, ["pp"]).sort((a, b) => a[0]! - b[0]!);
  const found = pipelines(experts);
  pipelines(attention).forEach((pipeline, i) => {
    if (pipeline.join() === found[i]?.join()) return;
    throw new UsageError(
      `Both grids need the same pipelines: expected ${pipeline.join("-")} of ${name(attention)}, `
      + `found ${found[i]!.join("-")} of ${name(experts)}.`);
  });
}

/** Refuses a layout: one sentence with the rule that is broken. */
export function broken(rule: string, expected: string, found: string | number): never {
  throw new UsageError(`The layout breaks the rule "${rule}": expected ${expected}, found ${found}.`);
}
