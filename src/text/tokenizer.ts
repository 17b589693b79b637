/**
 * Text to token ids and back. `byteTokenizer` (byte_tokenizer.ts) needs no files; `hubTokenizer` reads the
 * tokenizer.json of a published model. Tested in test/null/tokenizer.test.ts.
 */
import { Tokenizer as HubTokenizer } from "@huggingface/tokenizers";
import { FormatError } from "../tensor/errors.ts";
import { checkId } from "./ids.ts";
import { readTokenizerFiles } from "./tokenizer_files.ts";

export interface DecodeOptions {
  /** Leave out control tokens such as the end of a document. Default false. */
  readonly skipSpecial?: boolean;
}

/** Text that grows with every token. */
export interface DecodeStream {
  /** Adds a token and returns the text that is now certain: never half of a character. */
  push(id: number): string;
  /** Returns what was held back; incomplete bytes become U+FFFD. */
  finish(): string;
}

export interface Tokenizer {
  /** Ids are 0 .. vocabSize - 1. A model's vocabulary may be larger (padded). */
  readonly vocabSize: number;
  /** Id that goes before a raw prompt; null when the tokenizer puts none there. */
  readonly bosId: number | null;
  /** Id that ends a document. */
  readonly eosId: number;
  /** All ids at which generation stops; contains `eosId`. */
  readonly stopIds: readonly number[];
  /** Ids of a text, without begin and end ids. A special token spelled out in the text is one id. */
  encode(text: string): number[];
  /** Text of ids. Throws UsageError for an id outside the vocabulary. */
  decode(ids: ArrayLike<number>, options?: DecodeOptions): string;
  decodeStream(options?: DecodeOptions): DecodeStream;
  /** Id of a token such as `</think>`; null when the vocabulary lacks it. */
  idOf(token: string): number | null;
}

/** Ends of a turn, in chat templates of this family. */
const TURN_END = "<|im_end|>";
/** Incomplete bytes at the end of a text that a decoder was given in pieces. */
const REPLACEMENT = "\ufffd";
/** A character has at most four bytes: after as many tokens, a replacement character is meant. */
const MAX_PENDING = 4;

/**
 * The tokenizer of a tokenizer.json.
 *
 * @param json text of tokenizer.json
 * @param settings text of tokenizer_config.json, if there is one; names the begin and end tokens
 * Throws FormatError for a damaged file, an oversized split pattern, or a file without an end token.
 */
export function hubTokenizer(json: string, settings?: string): Tokenizer {
  const files = readTokenizerFiles(json, settings);
  let hub: HubTokenizer;
  try {
    hub = new HubTokenizer(files.tokenizer, files.settings);
  } catch (error) {
    throw new FormatError(`tokenizer.json: expected a usable tokenizer, found: ${(error as Error).message}`);
  }
  const idOf = (token: string): number | null => hub.token_to_id(token) ?? null;
  const eosId = files.endTokens.map(idOf).find((id) => id !== null);
  if (eosId === undefined) {
    const names = files.endTokens.join(" or ");
    throw new FormatError(`tokenizer.json: expected an end token (${names}), found none`);
  }
  const encode = (text: string, special: boolean): number[] => {
    const { ids } = hub.encode(text, { add_special_tokens: special });
    // A vocabulary without an unknown token gives undefined for what it cannot express.
    const missing = ids.findIndex((id) => !Number.isSafeInteger(id));
    if (missing !== -1) {
      throw new FormatError("tokenizer.json: expected tokens for all characters, found none for one");
    }
    return ids;
  };
  const [plain, wrapped] = [encode("a", false), encode("a", true)];
  const before = wrapped.length > plain.length && wrapped[0] !== plain[0] ? wrapped[0]! : null;
  const turnEnd = idOf(TURN_END);

  const common = {
    vocabSize: files.vocabSize,
    bosId: before === eosId ? null : before,
    eosId,
    stopIds: turnEnd === null || turnEnd === eosId ? [eosId] : [eosId, turnEnd],
    encode: (text: string) => (text === "" ? [] : encode(text, false)),
    idOf,
  };
  return { ...common, ...(files.isByteLevel ? byteDecoding : textDecoding)(hub, files.vocabSize) };
}

type Decoding = Pick<Tokenizer, "decode" | "decodeStream">;

/** Byte-level vocabularies: every token is bytes, and the bytes of all tokens in a row are UTF-8. */
function byteDecoding(hub: HubTokenizer, vocabSize: number): Decoding {
  const added = hub.get_added_tokens_decoder();
  const encoder = new TextEncoder();
  const known = new Map<number, readonly number[]>();
  const spell = (id: number): readonly number[] => {
    const literal = added.get(id)?.content;
    if (literal !== undefined) return Array.from(encoder.encode(literal));
    const bytes: number[] = [];
    for (const character of hub.id_to_token(id) ?? "") {
      const byte = BYTE_OF_CHARACTER.get(character);
      if (byte === undefined) bytes.push(...encoder.encode(character));
      else bytes.push(byte);
    }
    return bytes;
  };
  const bytesOf = (id: number, options: DecodeOptions | undefined): readonly number[] => {
    checkId(id, vocabSize);
    if (options?.skipSpecial && added.get(id)?.special) return [];
    let bytes = known.get(id);
    if (!bytes) known.set(id, (bytes = spell(id)));
    return bytes;
  };
  return {
    decode(ids, options) {
      const bytes: number[] = [];
      for (let i = 0; i < ids.length; i++) bytes.push(...bytesOf(ids[i]!, options));
      return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
    },
    decodeStream(options) {
      const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
      return {
        push: (id) => decoder.decode(Uint8Array.from(bytesOf(id, options)), { stream: true }),
        finish: () => decoder.decode(),
      };
    },
  };
}

/**
 * The characters that stand for bytes in byte-level vocabularies: printable Latin-1 ones for themselves,
 * U+0100 and up for the other 68 bytes in order.
 */
const BYTE_OF_CHARACTER: ReadonlyMap<string, number> = (() => {
  const map = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    map.set(String.fromCharCode(printable ? byte : next++), byte);
  }
  return map;
})();

function decodeWhole(hub: HubTokenizer, vocabSize: number, ids: number[], options?: DecodeOptions): string {
  for (const id of ids) checkId(id, vocabSize);
  if (ids.length === 0) return "";
  const skip = options?.skipSpecial ?? false;
  return hub.decode(ids, { skip_special_tokens: skip, clean_up_tokenization_spaces: false });
}

/**
 * Other vocabularies: what a token adds depends on the tokens before it (a space at the start of a word). So
 * the last tokens are decoded with and without the new ones; the difference is passed on once it is certain.
 */
function textDecoding(hub: HubTokenizer, vocabSize: number): Decoding {
  const decodeStream = (options?: DecodeOptions): DecodeStream => {
    // ids[0 .. known) have been passed on already; they are the context of the rest.
    let ids: number[] = [];
    let known = 0;
    const take = (final: boolean): string => {
      const before = decodeWhole(hub, vocabSize, ids.slice(0, known), options);
      const after = decodeWhole(hub, vocabSize, ids, options);
      const isCertain = final || !after.endsWith(REPLACEMENT) || ids.length - known >= MAX_PENDING;
      if (!isCertain || after.length <= before.length) return "";
      ids = ids.slice(known);
      known = ids.length;
      return after.slice(before.length);
    };
    return {
      push(id) {
        checkId(id, vocabSize);
        ids.push(id);
        return take(false);
      },
      finish: () => take(true),
    };
  };
  return { decode: (ids, options) => decodeWhole(hub, vocabSize, Array.from(ids), options), decodeStream };
}
