/** Forward and backward passes of micro-batches through the stages of a model. */
import { forRank } from "../gpu/lane.ts";
import { type GradientMap, Tape, type Walk } from "../autograd/tape.ts";
import { type Loss, type LossOptions, trainingContext } from "../models/nemotron_h.ts";
import type { ForwardContext, Overflow, PassPiece, Routing } from "../nn/context.ts";
import { MoE } from "../nn/moe.ts";
import { accumulate } from "../ops/elementwise.ts";
import { noGrad } from "../ops/op.ts";
import { OFFLOAD_OFF } from "../nn/offload.ts";
import { ranksPerStage } from "../parallel/mesh.ts";
import type { MeshModel } from "../parallel/model.ts";
import { Offload } from "../tensor/offload.ts";
import { type OverlapBlock, overlapBlocks, type OverlapNode, overlapOrder } from "../parallel/schedule.ts";
import { scope } from "../tensor/scope.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { StageInputs } from "./rank_inputs.ts";

/** What a forward pass of a stage found: losses where it has the head, routing of its layers. */
export interface StagePass {
  readonly stage: number;
  readonly main: Tensor | null;
  readonly mtp: readonly Tensor[];
  readonly aux: Tensor | null;
  readonly routing: readonly Routing[];
  /** What its experts had no room for; empty without a budget. */
  readonly overflow: readonly Overflow[];
}

/** A pass to be run. */
export interface ForwardPass {
  readonly stage: number;
  readonly micro: number;
  readonly inputs: StageInputs;
  /** Sees what was found, while it is in memory. */
  readonly visit: (pass: StagePass) => void;
}

/** A micro-batch in a stage between its passes. */
interface Alive {
  readonly tape: Tape;
  /** What came from the stage before: hidden states, of deeper predictions too behind their layers. */
  readonly entries: readonly Tensor[];
  /** Whose gradients are known when the backward pass begins, and these. */
  readonly outputs: Tensor[];
  readonly seeds: Tensor[];
  /** What the next stage goes on from. */
  readonly exits: readonly Tensor[];
  /** Its stage's place in the pipeline, and what it holds there. */
  readonly rank: number;
  /** Ops on the tape where a piece of a block begins, by both. */
  readonly begins: ReadonlyMap<string, number>;
  readonly blocks: readonly OverlapBlock[];
  bytes: number;
}

/** A backward pass under way. */
interface Returning {
  readonly stage: number;
  readonly micro: number;
  readonly alive: Alive;
  readonly walk: Walk;
  /** Gradients that came from the next stage. */
  readonly after: readonly Tensor[];
}

/** Bytes between passes at every place in a pipeline, on all ranks of a stage together. */
class Held {
  readonly #now: number[];
  readonly #peaks: number[];

  constructor(places: number) {
    this.#now = Array<number>(places).fill(0);
    this.#peaks = [...this.#now];
  }

  /** The most at one time. */
  get peaks(): readonly number[] {
    return this.#peaks;
  }

  add(place: number, bytes: number): void {
    this.#now[place]! += bytes;
    this.#peaks[place] = Math.max(this.#peaks[place]!, this.#now[place]!);
  }
}

/**
 * The passes of one step. Between stages activations go forth and their gradients back; what lies in between
 * lives from a stage's forward pass to its backward pass.
 */
export class Passes {
  readonly #mesh: MeshModel;
  readonly #options: LossOptions;
  readonly #held: Held;
  readonly #alive = new Map<string, Alive>();
  #returning: Returning | null = null;
  /** Activations and gradients that wait for the stage they were sent to. */
  readonly #sent = new Map<string, readonly Tensor[]>();

  constructor(mesh: MeshModel, options: LossOptions) {
    this.#mesh = mesh;
    this.#options = options;
    this.#held = new Held(mesh.layout.pp);
  }

  /**
   * Bytes that forward passes left for backward passes, the most at one time, of one rank at every place in
   * the pipeline; all ranks of a stage hold as much.
   */
  get activations(): readonly number[] {
    return this.#held.peaks.map((bytes) => bytes / ranksPerStage(this.#mesh.layout));
  }

  /** Runs a micro-batch forwards through a stage and sends the result on. */
  forward(pass: ForwardPass): void {
    this.#forward(pass, () => 0);
  }

  /** @param places as for `Tape.backward` */
  backward(stage: number, micro: number, places?: GradientMap): GradientMap {
    return this.#arrive(this.#turnBack(stage, micro, places));
  }

  /**
   * Both at once, of two micro-batches that need nothing of each other: what one computes stands beside the
   * exchanges of the other, in the order of `overlapOrder`. Results are those of one after the other.
   */
  pair(forward: ForwardPass, backward: { readonly stage: number; readonly micro: number }): GradientMap {
    const back = this.#turnBack(backward.stage, backward.micro);
    const { walk, alive: { begins, blocks, tape } } = back;
    const order = overlapOrder(this.#blocksOf(forward), blocks).flatMap(
      ({ comm, compute }) => [comm, compute]).filter((node): node is OverlapNode => node !== null);
    // What is behind the last exchange comes first: the head, at the end of a model.
    this.#goBack(back, () => walk.to(begins.get(`${blocks.length} before`) ?? tape.length));
    const stepBack = ({ block, node }: OverlapNode) => this.#goBack(back, () => {
      if (node === "before_weights" || node === "experts_weights") walk.weights();
      else walk.to(begins.get(`${block} ${node}`)!, true);
    });
    this.#forward(forward, (block, piece) => {
      let bytes = 0;
      for (let next = order.shift(); next; next = order.shift()) {
        if (next.kind === "backward") bytes += stepBack(next);
        else if (next.block === block && next.node === piece) break;
      }
      return bytes;
    });
    for (const node of order) if (node.kind === "backward") stepBack(node);
    return this.#arrive(back);
  }

  /** Layers of a stage, those of its prediction depths too, cut behind each layer of experts. */
  #blocksOf({ stage, inputs: { mtp: depths } }: ForwardPass): OverlapBlock[] {
    const { model: { blocks, mtp } } = this.#mesh.stages[stage]!;
    const layers = [...blocks, ...depths.flatMap(() => mtp?.blocks ?? [])];
    return overlapBlocks(layers.map(({ mixer }) => (mixer instanceof MoE ? "E" : "-")).join(""));
  }

  /** @param follow gives the bytes that it added to those in memory */
  #forward(pass: ForwardPass, follow: (block: number, piece: PassPiece) => number): void {
    const { stage, micro, inputs, visit } = pass;
    const key = `${stage} ${micro}`;
    const tape = new Tape();
    const entries = stage > 0 ? this.#take(`forth ${key}`) : [];
    const { rank } = this.#mesh.stages[stage]!;
    const before = this.#liveBytes() - bytesOf(entries);
    const begins = new Map<string, number>();
    let others = 0;
    let block = -1;
    const border = (piece: PassPiece) => {
      if (piece === "before") block++;
      others += follow(block, piece);
      begins.set(`${block} ${piece}`, tape.length);
    };
    const empty: Alive = {
      tape, entries, exits: [], outputs: [], seeds: [], rank, begins, blocks: this.#blocksOf(pass), bytes: 0,
    };
    this.#alive.set(key, empty);
    this.#mesh.onStage(stage, `forward ${micro}`, () => scope(() => {
      const overflow: Overflow[] = [];
      const { activations: modules, least } = this.#options.offload ?? OFFLOAD_OFF;
      const offload = modules.size > 0 ? { pass: new Offload(least), modules } : null;
      const { loss, exits } = tape.run(() => {
        border("before");
        return this.#run(stage, inputs, entries, { border, overflow, offload });
      });
      offload?.pass.end(this.#mesh.stages[stage]!.model.part.head);
      const { seeds } = inputs;
      const pairs: [Tensor | null, Tensor][] =
        [[loss.main, seeds.main], ...loss.mtp.map((one, i): [Tensor, Tensor] => [one, seeds.mtp[i]!]),
          [loss.aux, seeds.aux]];
      const known = pairs.filter((pair): pair is [Tensor, Tensor] => pair[0] !== null);
      this.#alive.set(key, {
        ...empty, exits, outputs: known.map(([output]) => output), seeds: known.map(([, seed]) => seed),
      });
      if (exits.length > 0) this.#send(`forth ${stage + 1} ${micro}`, exits, stage, stage + 1);
      visit({ stage, ...loss, overflow });
    }));
    for (const entry of entries) entry.release(); // the tape keeps what it needs
    const alive = this.#alive.get(key)!;
    alive.bytes = this.#liveBytes() - this.#onTheWay(`forth ${stage + 1} ${micro}`) - before - others;
    this.#held.add(rank, alive.bytes);
  }

  /** Begins a backward pass. */
  #turnBack(stage: number, micro: number, places?: GradientMap): Returning {
    const key = `${stage} ${micro}`;
    const alive = this.#alive.get(key)!;
    const { tape, exits, outputs, seeds, rank, bytes } = alive;
    const after = exits.length > 0 ? this.#take(`back ${key}`) : [];
    this.#held.add(rank, -bytes);
    this.#alive.delete(key);
    const walk = tape.walk(
      [...outputs, ...exits].flatMap(localsOf), [...seeds, ...after].flatMap(localsOf), places);
    const back = { stage, micro, alive, walk, after };
    this.#returning = back;
    return back;
  }

  /** A part of a backward pass. @returns the bytes that it added to those in memory */
  #goBack({ stage, micro }: Returning, body: () => void): number {
    const before = this.#liveBytes();
    this.#mesh.onStage(stage, `backward ${micro}`, () => noGrad(body));
    return this.#liveBytes() - before;
  }

  /** Ends a backward pass, and sends its result on. */
  #arrive(back: Returning): GradientMap {
    const { stage, micro, alive: { entries }, walk } = back;
    let gradients: GradientMap = new Map();
    this.#goBack(back, () => {
      gradients = walk.end();
      if (entries.length === 0) return;
      scope(() => {
        const returned = entries.map((entry) => localsOf(entry).map(({ key: leaf, shape, device }) => {
          const gradient = gradients.get(leaf);
          gradients.delete(leaf);
          return gradient ?? device.zeros(shape).retain();
        }));
        this.#send(
          `back ${stage - 1} ${micro}`, returned.map((locals) => shardedOf(locals)), stage, stage - 1);
        for (const gradient of returned.flat()) gradient.release();
      });
    });
    this.#returning = null;
    release(back);
    return gradients;
  }

  /** Runs a micro-batch through all stages without gradients; the last one's losses. */
  evaluate(inputs: readonly StageInputs[]): StagePass {
    let found: StagePass | null = null;
    let entries: readonly Tensor[] = [];
    for (let stage = 0; stage < inputs.length; stage++) {
      const { loss, exits } = this.#run(stage, inputs[stage]!, entries);
      found = { stage, ...loss, overflow: [] };
      entries = exits.map((exit) => this.#mesh.sendTo(exit, stage, stage + 1));
    }
    return found!;
  }

  /** Gives back what a step that failed has left. */
  dispose(): void {
    if (this.#returning) {
      this.#returning.walk.dispose();
      release(this.#returning);
      this.#returning = null;
    }
    for (const { tape } of this.#alive.values()) tape.dispose();
    for (const tensor of [...this.#sent.values()].flat()) tensor.release();
    this.#alive.clear();
    this.#sent.clear();
  }

  #run(
    stage: number, inputs: StageInputs, entries: readonly Tensor[],
    more: Pick<ForwardContext, "border" | "overflow" | "offload"> = {},
  ): { loss: Omit<StagePass, "stage" | "overflow">; exits: Tensor[] } {
    const { model } = this.#mesh.stages[stage]!;
    const context = { ...trainingContext(inputs, this.#options), ...more };
    const routing = context.routing!;
    const [entry, ...deeper] = entries;
    const x = model.part.embedding ? model.embed(inputs.input_ids) : entry!;
    const y = model.run(x, context);
    if (model.part.head) {
      const states = deeper.length > 0 ? deeper : undefined;
      const { main, mtp, aux }: Loss = model.lossFrom(y, inputs, this.#options, context, states);
      return { loss: { main, mtp, aux, routing }, exits: [] };
    }
    const backbone = routing.length;
    const exits = [y];
    // Prediction layers apart from the head: the states of all depths go on to it.
    if (model.part.mtp) {
      for (const { input_ids } of inputs.mtp) exits.push(model.mtpHidden(exits.at(-1)!, input_ids, context));
    }
    const share = 1 / inputs.mtp.length;
    const weighed = routing.map((one, i) => ({ ...one, share: i < backbone ? 1 : share }));
    const aux = model.auxLoss(weighed, inputs, this.#options);
    return { loss: { main: null, mtp: [], aux, routing }, exits };
  }

  #liveBytes(): number {
    return this.#mesh.devices.reduce((sum, { pool }) => sum + pool.liveBytes, 0);
  }

  #send(key: string, xs: readonly Tensor[], from: number, stage: number): void {
    const arrived = xs.map((x) => this.#mesh.sendTo(x, from, stage).retain());
    for (const local of arrived.flatMap(localsOf)) local.requiresGrad = key.startsWith("forth");
    this.#sent.set(key, arrived);
  }

  /** Bytes of a message that nothing else holds, its sender's tape among them. */
  #onTheWay(key: string): number {
    const arrived = (this.#sent.get(key) ?? []).flatMap(localsOf);
    return bytesOf(arrived.filter(({ storage }) => storage.refs === 1));
  }

  #take(key: string): readonly Tensor[] {
    const tensors = this.#sent.get(key);
    if (!tensors) throw new Error(`A pass came before what it goes on from: ${key}.`);
    this.#sent.delete(key);
    return tensors;
  }
}

function release({ alive, after }: Returning): void {
  alive.tape.dispose();
  for (const gradient of after) gradient.release();
}

function bytesOf(tensors: readonly Tensor[]): number {
  return tensors.flatMap(localsOf).reduce((sum, { storage }) => sum + storage.size, 0);
}

/**
 * Adds gradients to sums in their places.
 * @param ranks whose places these are, by the same keys
 */
export function addGradients(
  places: GradientMap, gradients: GradientMap, ranks: ReadonlyMap<number, number>,
): void {
  for (const [key, sum] of places) {
    const gradient = gradients.get(key);
    if (gradient) forRank(ranks.get(key)!, () => accumulate(sum, gradient.reshape(sum.shape)));
  }
}
