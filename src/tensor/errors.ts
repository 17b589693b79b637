/** Base of Krait's own errors. The message is one sentence: the thing, what was expected, what was found. */
export class KraitError extends Error {
  override name = "KraitError";
}

/** A tensor has the wrong number of dimensions, a wrong extent, or too many elements. */
export class ShapeError extends KraitError {
  override name = "ShapeError";
}

/** A tensor has the wrong number format, or a value does not fit the one asked for. */
export class DTypeError extends KraitError {
  override name = "DTypeError";
}

/** A model configuration is missing a key, contradicts itself, or asks for something unsupported. */
export class ConfigError extends KraitError {
  override name = "ConfigError";
}

/** A file (checkpoint, tokenizer, index, JSON text) is damaged, truncated or not what its name says. */
export class FormatError extends KraitError {
  override name = "FormatError";
}

/** Tokens that a rank's expert buffers have no room for. */
export interface MissedRows {
  /** Of the layout. */
  readonly rank: number;
  /** Checkpoint path of the layer. */
  readonly layer: string;
  /** Most rows that came in a micro-batch, and those that fit. */
  readonly found: number;
  readonly fit: number;
}

/** More tokens came to experts than a layout's expert_budget has room for; nothing was updated. */
export class ExpertOverflow extends KraitError {
  override name = "ExpertOverflow";
  readonly missed: readonly MissedRows[];

  constructor(missed: readonly MissedRows[], message: string) {
    super(message);
    this.missed = missed;
  }
}

/** A function was called in a way that its documentation rules out. */
export class UsageError extends KraitError {
  override name = "UsageError";
}
