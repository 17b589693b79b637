/** Token streams of documents, and the fixed-size batches that training and evaluation take from them. */
import { FormatError, UsageError } from "../tensor/errors.ts";
import type { Document } from "./data.ts";
import { hashIntegers, permutation } from "./random.ts";

/** What packing needs to know of a tokenizer. */
export interface Encoder {
  encode(text: string): ArrayLike<number>;
  readonly eosId: number;
}

/** Documents as one stream of tokens, each followed by the end token. */
export interface TokenCorpus {
  readonly tokens: Int32Array;
  /** Where each document starts in `tokens`, ascending; the first is 0. */
  readonly starts: Int32Array;
  /** UTF-8 bytes of all texts: the denominator of bits per byte. */
  readonly bytes: number;
  /** Tokens that are predicted: all but the first of every document, the end tokens included. */
  readonly scored: number;
  readonly eosId: number;
}

/** Labels of positions that are not scored. */
export const IGNORED = -100;

/** B rows of L positions, row-major. */
export interface Batch {
  readonly batch: number;
  readonly seqlen: number;
  /**
   * [B, L+1] the tokens of each row: `input_ids` and one more. Later prediction depths take their labels
   * from here.
   */
  readonly ids: Int32Array;
  /** [B, L] tokens 0..L-1 of each row. */
  readonly input_ids: Int32Array;
  /** [B, L] labels[t] is the token after t, or -100 where that belongs to another document. */
  readonly labels: Int32Array;
  /** [B, L] ordinal of the document within the row, from 0; a change of value starts a new document. */
  readonly seq_idx: Int32Array;
  /** Number of labels that are not -100. */
  readonly scored: number;
}

/** Where training is in the data. Serialisable; restoring it continues with the very next row. */
export interface PackingState {
  readonly epoch: number;
  /** Rows of this epoch already used. */
  readonly cursor: number;
}

export interface PackingOptions {
  /** Rows per batch, B >= 1. */
  readonly batch: number;
  /** Positions per row, L >= 1. */
  readonly seqlen: number;
  /** Decides the order of the rows in every epoch. Integer, 0 <= seed < 2^53. Default 0. */
  readonly seed?: number;
}

/**
 * Encodes documents to one stream, with the end token after each of them.
 *
 * @throws FormatError  when no document yields a token
 */
export function tokenizeDocuments(documents: Iterable<Document>, tokenizer: Encoder): TokenCorpus {
  let tokens = new Int32Array(1 << 16);
  let length = 0;
  let bytes = 0;
  const starts: number[] = [];
  for (const { text } of documents) {
    const encoded = tokenizer.encode(text);
    if (encoded.length === 0) continue;
    if (length + encoded.length + 1 > tokens.length) {
      const grown = new Int32Array(Math.max(2 * tokens.length, length + encoded.length + 1));
      grown.set(tokens.subarray(0, length));
      tokens = grown;
    }
    starts.push(length);
    tokens.set(encoded, length);
    length += encoded.length;
    tokens[length++] = tokenizer.eosId;
    bytes += utf8Length(text);
  }
  if (length === 0) throw new FormatError("The data holds no tokens: every document is empty.");
  return {
    tokens: tokens.slice(0, length),
    starts: Int32Array.from(starts),
    bytes,
    scored: length - starts.length,
    eosId: tokenizer.eosId,
  };
}

/**
 * bits per byte = loss / ln 2 * scored tokens / bytes.
 *
 * @param loss  mean cross-entropy in nats over the scored tokens of `corpus`
 */
export function bitsPerByte(loss: number, corpus: Pick<TokenCorpus, "scored" | "bytes">): number {
  return (loss / Math.LN2) * (corpus.scored / corpus.bytes);
}

/**
 * Cuts a corpus into rows of L+1 tokens and deals them out as batches [B, L].
 *
 * Row r holds the tokens r*L .. r*L+L: neighbouring rows share one token, which is the last label of one and
 * the first input of the other, so every token but a document's first is a label exactly once per epoch. The
 * last row is filled up with end tokens that are not scored. Every epoch has its own order of the rows, drawn
 * from (seed, epoch); a batch that reaches the end of an epoch goes on with the next one. Batches depend on
 * (corpus, options, position) alone.
 */
export class BatchPacker {
  readonly corpus: TokenCorpus;
  readonly batch: number;
  readonly seqlen: number;
  readonly seed: number;
  /** Rows per epoch. */
  readonly rows: number;
  /**
   * Hash of the tokens, their division and the order: equal for two runs that see the same batches. Eight
   * hex digits.
   */
  readonly fingerprint: string;
  #epoch = 0;
  #cursor = 0;
  #order: Uint32Array;
  #orderEpoch = 0;

  /** @throws UsageError  when `batch`, `seqlen` or `seed` is out of range, or the corpus has no label */
  constructor(corpus: TokenCorpus, options: PackingOptions) {
    const { batch, seqlen, seed = 0 } = options;
    for (const [name, value] of [["batch", batch], ["seqlen", seqlen]] as const) {
      if (!Number.isSafeInteger(value) || value < 1) {
        throw new UsageError(`The packing's ${name} must be a whole number of at least 1, found ${value}.`);
      }
    }
    if (!Number.isSafeInteger(seed) || seed < 0) {
      throw new UsageError(`The packing's seed must be a whole number of at least 0, found ${seed}.`);
    }
    if (corpus.tokens.length < 2) {
      throw new UsageError(`A corpus needs at least 2 tokens to predict one, found ${corpus.tokens.length}.`);
    }
    this.corpus = corpus;
    this.batch = batch;
    this.seqlen = seqlen;
    this.seed = seed;
    this.rows = Math.ceil((corpus.tokens.length - 1) / seqlen);
    const data = [hashIntegers(corpus.starts), hashIntegers(corpus.tokens)];
    this.fingerprint = hashIntegers([batch, seqlen, ...data], seed).toString(16).padStart(8, "0");
    this.#order = permutation(this.rows, seed, 0);
  }

  /** Where the next batch starts. */
  get state(): PackingState {
    return { epoch: this.#epoch, cursor: this.#cursor };
  }

  /**
   * Goes to a saved position.
   *
   * @throws FormatError  when the position lies outside this corpus
   */
  restore(state: PackingState): void {
    const { epoch, cursor } = state;
    const fits = Number.isSafeInteger(epoch) && epoch >= 0 && Number.isSafeInteger(cursor) && cursor >= 0;
    if (!fits || cursor >= this.rows) {
      throw new FormatError(
        `The data position (epoch ${epoch}, row ${cursor}) does not fit this corpus of ${this.rows} rows.`,
      );
    }
    this.#epoch = epoch;
    this.#cursor = cursor;
  }

  /** Goes to where `batches` calls of `next` lead from the start. */
  seek(batches: number): void {
    const rows = batches * this.batch;
    this.restore({ epoch: Math.floor(rows / this.rows), cursor: rows % this.rows });
  }

  /** Makes the next training batch and moves on by B rows. */
  next(): Batch {
    const rows: number[] = [];
    while (rows.length < this.batch) {
      if (this.#orderEpoch !== this.#epoch) {
        this.#order = permutation(this.rows, this.seed, this.#epoch);
        this.#orderEpoch = this.#epoch;
      }
      rows.push(this.#order[this.#cursor++]!);
      if (this.#cursor === this.rows) {
        this.#cursor = 0;
        this.#epoch++;
      }
    }
    return this.#assemble(rows);
  }

  /**
   * Makes batches over the corpus in its own order, each row once, for evaluation; training's position stays.
   * Places left over in the last batch hold rows that are not scored. Weigh each batch's loss by its
   * `scored`.
   *
   * @param maxRows  take this many rows at most, spread evenly over the corpus. Default: all
   */
  *sequential(maxRows = Infinity): Generator<Batch> {
    const count = Math.min(this.rows, Math.max(1, Math.floor(maxRows)));
    for (let first = 0; first < count; first += this.batch) {
      const rows = Array.from({ length: this.batch }, (_, i) => {
        return first + i < count ? Math.floor(((first + i) * this.rows) / count) : -1;
      });
      yield this.#assemble(rows);
    }
  }

  #assemble(rows: readonly number[]): Batch {
    const { batch, seqlen } = this;
    const { tokens, starts, eosId } = this.corpus;
    const ids = new Int32Array(batch * (seqlen + 1)).fill(eosId);
    const input_ids = new Int32Array(batch * seqlen).fill(eosId);
    const labels = new Int32Array(batch * seqlen).fill(IGNORED);
    const seq_idx = new Int32Array(batch * seqlen);
    let scored = 0;
    for (const [b, row] of rows.entries()) {
      if (row < 0) continue;
      const from = row * seqlen;
      const part = tokens.subarray(from, from + seqlen + 1);
      ids.set(part, b * (seqlen + 1));
      input_ids.set(part.subarray(0, seqlen), b * seqlen);
      let document = upperBound(starts, from);
      let ordinal = 0;
      for (let t = 0; t < seqlen; t++) {
        seq_idx[b * seqlen + t] = ordinal;
        const next = from + t + 1;
        // The padding after the last token counts as one more document.
        if (next === (starts[document] ?? tokens.length)) {
          document++;
          ordinal++;
        } else if (next < tokens.length) {
          labels[b * seqlen + t] = tokens[next]!;
          scored++;
        }
      }
    }
    return { batch, seqlen, ids, input_ids, labels, seq_idx, scored };
  }
}

/**
 * Tokens `depth` positions further on, which multi-token prediction reads beside the hidden state:
 * y[b,t] = ids[b,t+depth], 0 beyond the row (where `mtpLabels` scores nothing).
 *
 * @param depth  1 <= depth < L
 * @returns [B, L], row-major
 */
export function mtpInputs(batch: Pick<Batch, "batch" | "seqlen" | "ids">, depth: number): Int32Array {
  const { seqlen, ids } = batch;
  return shifted(batch, depth, 0, (b, t) => ids[b * (seqlen + 1) + t + depth]!);
}

/**
 * What multi-token prediction is scored on: y[b,t] = labels[b,t+depth] where both positions belong to one
 * document, else -100.
 *
 * @param depth  1 <= depth < L
 * @returns [B, L], row-major
 */
export function mtpLabels(
  batch: Pick<Batch, "batch" | "seqlen" | "labels" | "seq_idx">,
  depth: number,
): Int32Array {
  const { seqlen, labels, seq_idx } = batch;
  return shifted(batch, depth, IGNORED, (b, t) => {
    const at = b * seqlen + t;
    return t + depth < seqlen && seq_idx[at] === seq_idx[at + depth] ? labels[at + depth]! : IGNORED;
  });
}

function shifted(
  { batch, seqlen }: Pick<Batch, "batch" | "seqlen">,
  depth: number,
  filler: number,
  pick: (b: number, t: number) => number,
): Int32Array {
  if (!Number.isInteger(depth) || depth < 1 || depth >= seqlen) {
    throw new UsageError(`The depth must be a whole number from 1 to ${seqlen - 1}, found ${depth}.`);
  }
  return Int32Array.from({ length: batch * seqlen }, (_, i) => {
    const t = i % seqlen;
    return t + depth <= seqlen ? pick((i - t) / seqlen, t) : filler;
  });
}

/** The first index whose value exceeds `value`. */
function upperBound(sorted: Int32Array, value: number): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (sorted[middle]! <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}

function utf8Length(text: string): number {
  let bytes = text.length;
  for (let i = 0; i < text.length; i++) {
    const unit = text.charCodeAt(i);
    if (unit < 0x80) continue;
    // Two units of a surrogate pair make four bytes: two each.
    bytes += unit < 0x800 || (unit >= 0xd800 && unit <= 0xdfff) ? 1 : 2;
  }
  return bytes;
}
