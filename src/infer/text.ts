import type { Tokenizer } from "../text/tokenizer.ts";
import { type GenerateOptions, type Generator } from "./engine.ts";

export interface TextOptions extends Omit<GenerateOptions, "stopTokens"> {
  /** Texts that end the generation; none of them is part of the result. */
  readonly stopStrings?: readonly string[];
}

/** A generation in progress, as text. */
export interface TextRun {
  /**
   * Pieces of text as they become certain: whole characters,
   * and nothing that may still turn into a stop string.
   */
  readonly pieces: AsyncIterable<string>;
  /** Tokens generated so far. */
  readonly tokens: number[];
  /** What ended it: "length", "token" (an end token), or the stop string. */
  stopped: string;
}

/** Generates text from a prompt of tokens. */
export function generateText(
  generator: Generator, tokenizer: Tokenizer, prompt: readonly number[], options: TextOptions,
): TextRun {
  const stops = (options.stopStrings ?? []).filter((text) => text !== "");
  const longest = Math.max(0, ...stops.map((text) => text.length));
  const run = { tokens: [] as number[], stopped: "length" };

  async function* pieces(): AsyncGenerator<string> {
    const decoder = tokenizer.decodeStream({ skipSpecial: true });
    let held = "";
    /** Text that cannot be part of a stop string any more; cuts `held` at the first stop string found. */
    const release = (final: boolean): string => {
      let end = Infinity;
      for (const stop of stops) {
        const at = held.indexOf(stop);
        if (at >= 0 && at < end) {
          end = at;
          run.stopped = stop;
        }
      }
      if (end < Infinity) {
        const text = held.slice(0, end);
        held = "";
        return text;
      }
      const keep = final ? 0 : Math.min(held.length, Math.max(0, longest - 1));
      const text = held.slice(0, held.length - keep);
      held = held.slice(held.length - keep);
      return text;
    };
    const { stopStrings: _, ...rest } = options;
    let ended = false;
    for await (const token of generator.generate(prompt, { ...rest, stopTokens: [] })) {
      run.tokens.push(token);
      if (tokenizer.stopIds.includes(token)) {
        run.stopped = "token";
        ended = true;
        break;
      }
      if (token < tokenizer.vocabSize) held += decoder.push(token); // a model's vocabulary may be padded
      const text = release(false);
      if (text !== "") yield text;
      if (stops.includes(run.stopped)) return;
    }
    held += decoder.finish();
    const last = release(true);
    if (last !== "") yield last;
    if (!ended && options.signal?.aborted) run.stopped = "interrupted";
  }
  return Object.assign(run, { pieces: pieces() });
}
