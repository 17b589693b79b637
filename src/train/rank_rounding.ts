/**
 * What the ranks of a stage must agree about so that low precision gives the codes that one rank would: which
 * of them hold parts of one tensor, where their rows and columns stand in it, and that no cut divides a
 * block.
 */
import { zigzag } from "../nn/context_parallel.ts";
import type { Group } from "../ops/collectives.ts";
import { FAKE_LAYOUTS, type Place } from "../ops/fake_quantize.ts";
import type { Layout } from "../parallel/layout.ts";
import { broken, stageGroups } from "../parallel/mesh.ts";
import type { MeshModel } from "../parallel/model.ts";
import { type Cut, type Shard, takePiece } from "../parallel/shards.ts";
import type { RankPlace } from "../precision/precision.ts";
import type { Operand, Products } from "../precision/recipes.ts";
import type { Device } from "../tensor/device.ts";
import { localsOf } from "../tensor/sharded.ts";
import { unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** Rows and positions of a micro-batch. */
export interface RowSizes {
  readonly batch: number;
  readonly seqlen: number;
}

/** Elements of the blocks of Hadamard transforms and of NVFP4, by which random bits are numbered. */
const UNIT = 16;

/** The dimensions [outputs, inputs] of a matrix or of a stack of them. */
const dimensionsOf = ({ parameter: { shape } }: Shard): [number, number] =>
  [shape.length - 2, shape.length - 1];

const blockOf = (operand: Operand): number => FAKE_LAYOUTS[operand.format].block ?? 1;
const largest = (...operands: readonly Operand[]): number => Math.max(...operands.map(blockOf));

/**
 * Whether the blocks of all products lie on one rank each, so that their codes are those of one rank.
 * @param plan formats by parameter name
 * @throws UsageError with the rule that a cut breaks
 */
export function checkBlocks(
  plan: ReadonlyMap<string, Products>, shards: (name: string) => Shard | null, layout: Layout,
  { batch, seqlen }: RowSizes,
): void {
  const { cp, tp, sp } = layout;
  for (const [name, products] of plan) {
    const shard = shards(name);
    if (!shard) return;
    const { fprop, dgrad, wgrad } = products;
    const [outputs, inputs] = dimensionsOf(shard);
    const tiles = Math.max(...[fprop.weight, dgrad.weight].map((operand) =>
      (operand.blocks === "tiles" ? blockOf(operand) : 1)));
    const wanted = new Map([
      [outputs, Math.max(tiles, largest(dgrad.dy, dgrad.weight))],
      [inputs, Math.max(tiles, largest(fprop.x, fprop.weight))],
    ]);
    for (const { dim, axis, sections, pieces } of shard.cuts) {
      const block = wanted.get(dim) ?? 1;
      const piece = sections.map((extent) => extent / pieces).find((extent) => extent % block !== 0);
      if (piece === undefined || pieces === 1) continue;
      broken(
        "blocks of low precision lie on one rank",
        `pieces of whole blocks of ${block} in the ${dim === outputs ? "outputs" : "inputs"} of ${name}, ` +
        `which ${axis} = ${layout[axis]} cuts`, `one of ${piece}`);
    }
    const down = largest(wgrad.x, wgrad.dy);
    if (shard.expert || down === 1) continue;
    const stretches = cp > 1 ? seqlen / (2 * cp) : null;
    const parts = sp && tp > 1 && shard.cuts.length === 0 ? seqlen / (cp * tp) : null;
    for (const [what, length] of [[`2 cp = ${2 * cp}`, stretches], [`cp tp = ${cp * tp}`, parts]] as const) {
      if (length === null || length % down === 0) continue;
      broken(
        "blocks of low precision lie on one rank",
        `whole blocks of ${down} tokens of a row in each of ${what} parts, for the gradient of ${name}`,
        `${length} of ${batch} x ${seqlen}`);
    }
  }
}

/** The ranks of a stage, for every projection that they hold. */
export class RankRoundings {
  readonly #layout: Layout;
  readonly #mesh: MeshModel;
  readonly #sizes: RowSizes;
  readonly #tables: Tensor[] = [];
  readonly #groups: Readonly<Record<"tp" | "etp" | "tp-cp" | "tp-dp-cp", Group>>;
  /** Ranks whose tokens meet on one expert's rank. */
  readonly #meeting: Group;

  constructor(mesh: MeshModel, sizes: RowSizes) {
    const { layout } = mesh;
    this.#mesh = mesh;
    this.#layout = layout;
    this.#sizes = sizes;
    const group = (name: "tp" | "etp" | "tp-cp" | "tp-dp-cp" | "etp-ep"): Group =>
      ({ name, members: stageGroups(layout, name), algorithm: layout.algorithm });
    const [tokens, all] = [group("tp-cp"), group("tp-dp-cp")];
    this.#groups = { tp: group("tp"), etp: group("etp"), "tp-cp": tokens, "tp-dp-cp": all };
    const isWithin = group("etp-ep").members.every((ranks) =>
      tokens.members.some((own) => ranks.every((rank) => own.includes(rank))));
    this.#meeting = isWithin ? tokens : all;
  }

  /** Ranks with parts of one input and of one gradient. */
  tensorOf(name: string): Group {
    return this.#shard(name).expert ? this.#meeting : this.#groups["tp-cp"];
  }

  /** Ranks with parts of one matrix. */
  matrixOf(name: string): Group {
    return this.#groups[this.#shard(name).expert ? "etp" : "tp"];
  }

  /** Whether some ranks have other matrices of the stack than others. */
  isDivided(name: string): boolean {
    return this.#shard(name).expert && this.#layout.ep > 1;
  }

  /** The first of a rank's matrices. */
  firstMatrix(name: string, rank: number): number {
    const { expert, parameter: { shape } } = this.#shard(name);
    return expert ? this.#mesh.coordinates(rank).ep * (shape[0]! / this.#layout.ep) : 0;
  }

  /** @param weight on all ranks of its stage */
  placesOf(name: string, weight: Tensor, { dgrad, wgrad }: Products): RankPlace[] {
    const shard = this.#shard(name);
    const isRandom = dgrad.dy.stochastic === true || wgrad.dy.stochastic === true;
    return localsOf(weight).map(({ device }, rank) => {
      if (!shard.expert) {
        const { dp } = this.#mesh.coordinates(rank);
        return { micro: dp, apart: 0, ...(isRandom ? this.#densePlaces(shard, rank, device) : NOWHERE) };
      }
      // Those who share the width of an expert have the same rows.
      const leader = this.#groups.etp.members.find((ranks) => ranks.includes(rank))![0]!;
      const apart = this.#groups["tp-cp"].members.find((ranks) => ranks.includes(leader))!.indexOf(leader);
      return {
        micro: this.#mesh.coordinates(leader).dp, apart,
        ...(isRandom ? this.#expertPlaces(shard, rank, device) : NOWHERE),
      };
    });
  }

  dispose(): void {
    for (const table of this.#tables) table.dispose();
  }

  #shard(name: string): Shard {
    return this.#mesh.parameters.get(name)!.shard!;
  }

  /** The numbers in the whole of a rank's blocks of outputs. */
  #columns({ cuts, parameter: { shape } }: Shard, [dimension]: readonly [number, number], rank: number) {
    const extent = shape[dimension]!;
    const blocks = Array.from({ length: Math.ceil(extent / UNIT) }, (_, i) => i);
    const cut = cuts.find(({ dim }) => dim === dimension);
    if (!cut) return { own: blocks, isWhole: true, whole: blocks.length };
    // Pieces are whole blocks (checkBlocks).
    const inBlocks: Cut = { ...cut, dim: 0, sections: cut.sections.map((section) => section / UNIT) };
    const piece = Math.floor((this.#mesh.coordinates(rank)[cut.axis] * cut.pieces) / cut.ranks);
    const own = [...takePiece(Float32Array.from(blocks), [blocks.length], inBlocks, piece)];
    return { own, isWhole: cut.pieces === 1, whole: blocks.length };
  }

  #densePlaces(shard: Shard, rank: number, device: Device): Pick<RankPlace, "along" | "down"> {
    const { tp, cp, sp } = this.#layout;
    const { batch, seqlen } = this.#sizes;
    const at = this.#mesh.coordinates(rank);
    const columns = this.#columns(shard, dimensionsOf(shard), rank);
    let positions = zigzag(cp, seqlen)[at.cp]!;
    if (sp && shard.cuts.length === 0) {
      const part = positions.length / tp;
      positions = positions.slice(at.tp * part, (at.tp + 1) * part);
    }
    const isWhole = positions.length === seqlen;
    if (isWhole && columns.isWhole) return NOWHERE;
    const rows = isWhole ? [] : Array.from({ length: batch }, (_, b) =>
      positions.map((position) => b * seqlen + position)).flat();
    const blocks = rows.filter((_, i) => i % UNIT === 0).map((row) => row / UNIT);
    return {
      along: this.#place(device, rows, columns.own, columns.whole),
      down: this.#place(device, blocks, columns.own, Math.ceil((batch * seqlen) / UNIT)),
    };
  }

  /** An expert's rows stand as they arrive. */
  #expertPlaces(shard: Shard, rank: number, device: Device): Pick<RankPlace, "along" | "down"> {
    const { own, isWhole, whole } = this.#columns(shard, dimensionsOf(shard), rank);
    if (isWhole) return NOWHERE;
    return {
      along: this.#place(device, [], own, whole), down: this.#place(device, [], own, 2 ** 16),
    };
  }

  #place(device: Device, lines: readonly number[], columns: readonly number[], whole: number): Place {
    const table = unscoped(() => device.tensor(
      Uint32Array.from([...lines, ...columns]), [lines.length + columns.length]));
    this.#tables.push(table);
    return { table, lines: lines.length, whole };
  }
}

const NOWHERE = { along: null, down: null } as const;
