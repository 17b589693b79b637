/**
 * Self-speculation: the model's MTP head drafts tokens, one pass of the whole model checks them all.
 * Attention caches are cut back by forgetting positions; recurrent states are only advanced, from the inputs
 * that the checking pass left, once it is known how many tokens were accepted.
 */
import type { Graph } from "../gpu/stream.ts";
import type { ForwardContext } from "../nn/context.ts";
import { type ModelCache, type NemotronH } from "../models/nemotron_h.ts";
import { embedding } from "../ops/embedding.ts";
import { argmax, probabilities, sample } from "../ops/sample.ts";
import type { Device } from "../tensor/device.ts";
import { UsageError } from "../tensor/errors.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type Sampling, uniformStream, type Verdict, verifyDrafts } from "./sampling.ts";

/** Philox streams of one seed: plain sampling, drafting, and the verdicts on drafts. */
export const STREAM = { sample: 0, draft: 1, verdict: 2 } as const;

/** Drafts of one pass and what became of them. */
export interface Pass extends Verdict {
  readonly drafts: readonly number[];
}

interface Captured {
  readonly draft: Graph;
  readonly verify: Graph;
  /** By number of tokens taken. */
  readonly commit: (Graph | undefined)[];
  /** u32: n drafts, then, for greedy runs, the n + 1 tokens that the model itself would take. */
  readonly tokens: Tensor;
  /** For sampled runs: (n, V) the drafts were drawn from, (n + 1, V) of the model. */
  readonly q: Tensor | null;
  readonly p: Tensor | null;
}

/** The speculative run of one sequence with a fixed number of drafts a pass. */
export class Speculation {
  readonly #model: NemotronH;
  readonly #device: Device;
  readonly #cache: ModelCache;
  readonly #n: number;
  readonly #sampling: Sampling;
  readonly #settings: Tensor;
  readonly #uniform: () => number;
  /** Hidden states of the last pass (1, n + 1, D) and the tokens that follow them. */
  readonly #hidden: Tensor;
  readonly #following: Tensor;
  /** i32 [1]: the last of those rows that holds an accepted token. */
  readonly #row: Tensor;
  /** u32 [1] each: MTP position of the first of those rows, and of every further depth. */
  readonly #positions: readonly Tensor[];
  readonly #counters: readonly Tensor[];
  readonly #verifyIds: Tensor;
  #captured: Captured | null = null;
  #mtpPosition = 0;
  #taken: number[] = [];
  #passes = 0;

  /** @throws UsageError when the model has no MTP layers, or recurrent ones among them. */
  constructor(model: NemotronH, cache: ModelCache, n: number, sampling: Sampling, settings: Tensor) {
    if (!model.mtp) throw new UsageError("Drafting needs a model with MTP layers; this one has none.");
    if (cache.mtp.some((layer) => layer?.kind === "mamba2")) {
      throw new UsageError(
        "Drafting needs MTP layers without recurrent state; this model's MTP pattern holds Mamba layers.");
    }
    this.#model = model;
    this.#device = model.device;
    this.#cache = cache;
    this.#n = n;
    this.#sampling = sampling;
    this.#settings = settings;
    this.#uniform = uniformStream(sampling.seed, STREAM.verdict);
    const { device } = model;
    const each = (shape: number[]) => Array.from({ length: n }, () => device.zeros(shape, "u32"));
    [
      this.#hidden, this.#following, this.#row, this.#verifyIds, this.#positions, this.#counters,
    ] = unscoped(() => [
      device.zeros([1, n + 1, model.config.hidden_size]), device.zeros([1, n + 1], "i32"),
      device.zeros([1], "i32"), device.zeros([1, n + 1], "i32"), each([1]), each([4]),
    ]) as [Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[]];
  }

  /** Begins after a prompt: `last` is the hidden state (1, D) of its last position. */
  start(last: Tensor, position: number): void {
    this.#device.stream.copy(
      last.storage, last.byteOffset, this.#hidden.storage, this.#hidden.byteOffset, last.byteLength);
    this.#mtpPosition = position;
    this.#taken = [];
  }

  /** Captures what a pass replays, so that it begins to compile. */
  prepare(): void {
    const captured = (this.#captured ??= this.#capture());
    for (let taken = 1; taken <= this.#n + 1; taken++) captured.commit[taken] ??= this.#captureCommit(taken);
  }

  /** Drafts after `token` (drawn, not yet run), verifies, and takes what was accepted into the caches. */
  async pass(token: number): Promise<Pass> {
    const n = this.#n;
    const cache = this.#cache;
    const following = [...this.#taken, token];
    this.#following.write(Int32Array.from(following));
    this.#row.write(Int32Array.from([following.length - 1]));
    this.#positions.forEach((position, d) =>
      position.write(Uint32Array.from([this.#mtpPosition + (d === 0 ? 0 : following.length - 1 + d)])));
    const { seed } = this.#sampling;
    this.#counters.forEach((counter, d) => counter.write(
      Uint32Array.from([seed >>> 0, Math.floor(seed / 2 ** 32), this.#passes * n + d, STREAM.draft])));
    this.#verifyIds.write(Int32Array.from([token]));
    cache.position.write(Uint32Array.from([cache.length]));
    this.#passes++;

    const captured = (this.#captured ??= this.#capture());
    this.#device.replay(captured.draft);
    this.#device.replay(captured.verify);
    const tokens = Array.from(await captured.tokens.read());
    const drafts = tokens.slice(0, n);
    let verdict: Verdict;
    if (captured.p && captured.q) {
      const [p, q] = [await captured.p.read(), await captured.q.read()] as [Float32Array, Float32Array];
      verdict = verifyDrafts(drafts, q, p, this.#model.config.vocab_size, this.#uniform);
    } else {
      const own = tokens.slice(n);
      let accepted = 0;
      while (accepted < n && drafts[accepted] === own[accepted]) accepted++;
      verdict = { accepted, next: own[accepted]! };
    }
    const taken = verdict.accepted + 1;
    this.#device.replay((captured.commit[taken] ??= this.#captureCommit(taken)));
    this.#mtpPosition = cache.length;
    cache.length += taken;
    this.#taken = drafts.slice(0, verdict.accepted);
    return { drafts, ...verdict };
  }

  dispose(): void {
    const { draft, verify, commit = [] } = this.#captured ?? {};
    for (const graph of [...commit, draft, verify]) if (graph) this.#device.stream.disposeGraph(graph);
    const own =
      [this.#hidden, this.#following, this.#row, this.#verifyIds, ...this.#positions, ...this.#counters];
    for (const tensor of own) tensor.dispose();
    if (this.#captured) {
      for (const tensor of [this.#captured.tokens, this.#captured.p, this.#captured.q]) tensor?.dispose();
    }
    for (const layer of this.#cache.layers) if (layer?.kind === "mamba2") layer.pending = null;
  }

  #capture(): Captured {
    return unscoped(() => this.#captureInto(this.#outputs()));
  }

  /** What a pass reads back. */
  #outputs(): Pick<Captured, "tokens" | "q" | "p"> {
    const device = this.#device;
    const n = this.#n;
    const V = this.#model.config.vocab_size;
    const greedy = this.#sampling.temperature === 0;
    return {
      tokens: device.zeros([greedy ? 2 * n + 1 : n], "u32"),
      q: greedy ? null : device.zeros([n, V]), p: greedy ? null : device.zeros([n + 1, V]),
    };
  }

  #captureInto({ tokens, q, p }: Pick<Captured, "tokens" | "q" | "p">): Captured {
    const model = this.#model;
    const device = this.#device;
    const cache = this.#cache;
    const n = this.#n;
    const { hidden_size: D, vocab_size: V } = model.config;
    const greedy = this.#sampling.temperature === 0;
    const { stream } = device;
    const put = (from: Tensor, fromElement: number, to: Tensor, toElement: number, count: number) =>
      stream.copy(
        from.storage, from.byteOffset + 4 * fromElement,
        to.storage, to.byteOffset + 4 * toElement, 4 * count);

    const draft = device.capture(() => scope(() => {
      // The rows of the last pass first: they put true hidden states where drafting had put its own guesses.
      const all = model.mtpHidden(this.#hidden, this.#following, at(this.#positions[0]!, true), cache);
      let h = embedding(this.#row, all.reshape([n + 1, D]));
      for (let d = 0; d < n; d++) {
        const logits = model.logits(h);
        const drawn = greedy ? argmax(logits) : sample(logits, this.#settings, this.#counters[d]!);
        put(drawn, 0, tokens, d, 1);
        put(drawn, 0, this.#verifyIds, d + 1, 1);
        if (q) put(probabilities(logits, this.#settings), 0, q, d * V, V);
        if (d + 1 === n) break;
        const ids = device.empty([1, 1], "i32");
        put(drawn, 0, ids, 0, 1);
        h = model.mtpHidden(h.reshape([1, 1, D]), ids, at(this.#positions[d + 1]!, false), cache)
          .reshape([1, D]);
      }
    })).graph;

    const recordVerify = () => scope(() => {
      const h = model.hidden(this.#verifyIds, at(cache.position, true), cache);
      this.#hidden.copyFrom(h);
      const logits = model.logits(h.reshape([n + 1, D]));
      if (p) p.copyFrom(probabilities(logits, this.#settings));
      else put(argmax(logits), 0, tokens, n, n + 1);
      // What `commit` will read must not be reused inside the graph.
      return cache.layers.map((layer) => layer?.kind === "mamba2" ? layer.pending as unknown : null);
    });
    try {
      return { draft, verify: device.capture(recordVerify).graph, commit: [], tokens, q, p };
    } catch (error) {
      stream.disposeGraph(draft);
      throw error;
    }
  }

  #captureCommit(length: number): Graph {
    return this.#device.capture(() => scope(() => this.#model.commit(length, this.#cache))).graph;
  }
}

/** One call at a position that the GPU knows; `verify` for several tokens whose acceptance is still open. */
function at(position: Tensor, verify: boolean): ForwardContext {
  return { seq_idx: null, routing: null, step: { position, length: 0, decode: !verify, verify } };
}
