/** Reads tokenizer.json and tokenizer_config.json and checks them before anything is built from them. */
import { isObject, parseJson } from "../io/json.ts";
import type { JsonObject, JsonValue } from "../io/json.ts";
import { FormatError } from "../tensor/errors.ts";

export interface TokenizerFiles {
  readonly tokenizer: JsonObject;
  readonly settings: JsonObject;
  /** One more than the largest id. */
  readonly vocabSize: number;
  /** True when tokens are spelled in the 256 characters that stand for bytes. */
  readonly isByteLevel: boolean;
  /** Candidates for the token that ends a document, best first. */
  readonly endTokens: readonly string[];
}

/** Longest file, in characters: ten times that of a 131,072 token vocabulary. */
const MAX_FILE = 200_000_000;
/** Longest regular expression: ten times that of published models. */
const MAX_PATTERN = 4096;
const MODEL_TYPES = ["BPE", "Unigram", "WordPiece"];
const MAX_VOCABULARY = 2 ** 24;
/** Parts that a file may leave out and the library wants to see. */
const ABSENT = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };
const COMMON_ENDS = ["</s>", "<|endoftext|>", "<|im_end|>", "<eos>"];

/** Throws FormatError naming the file, the part, expected and found. */
export function readTokenizerFiles(json: string, settingsJson: string | undefined): TokenizerFiles {
  const tokenizer = readObject("tokenizer.json", json);
  const settings = settingsJson === undefined ? {} : readObject("tokenizer_config.json", settingsJson);
  const { model, decoder } = tokenizer;
  const vocabulary = isObject(model) ? model["vocab"] : undefined;
  if (!isObject(model) || !vocabulary) {
    throw new FormatError("tokenizer.json: expected model.vocab, found none");
  }
  const { type } = model;
  if (typeof type !== "string" || !MODEL_TYPES.includes(type)) {
    const found = JSON.stringify(type) ?? "none";
    const types = MODEL_TYPES.join(" or ");
    throw new FormatError(`tokenizer.json: expected a model of type ${types}, found ${found}`);
  }
  for (const part of ["normalizer", "pre_tokenizer", "decoder"]) checkPatterns(part, tokenizer[part]);

  const ids: number[] = [];
  if (isObject(vocabulary)) {
    for (const [token, id] of Object.entries(vocabulary)) ids.push(checkTokenId(token, id));
  } else if (Array.isArray(vocabulary)) {
    vocabulary.forEach((_, id) => ids.push(id));
  }
  const added = tokenizer["added_tokens"] ?? [];
  if (!Array.isArray(added)) {
    throw new FormatError("tokenizer.json: expected a list added_tokens, found something else");
  }
  for (const token of added) {
    const content = isObject(token) ? token["content"] : undefined;
    if (!isObject(token) || typeof content !== "string" || content === "") {
      throw new FormatError("tokenizer.json: expected content and id of each added token, found none");
    }
    ids.push(checkTokenId(content, token["id"]));
  }
  let largest = -1;
  for (const id of ids) largest = Math.max(largest, id);
  if (largest === -1) throw new FormatError("tokenizer.json: expected at least one token, found none");

  const named = settings["eos_token"];
  const name = isObject(named) ? named["content"] : named;
  return {
    tokenizer: { ...ABSENT, ...tokenizer, added_tokens: added },
    settings,
    vocabSize: largest + 1,
    isByteLevel: isByteLevel(decoder),
    endTokens: typeof name === "string" ? [name] : COMMON_ENDS,
  };
}

function readObject(what: string, json: string): JsonObject {
  if (json.length > MAX_FILE) {
    throw new FormatError(`${what}: expected at most ${MAX_FILE} characters, found ${json.length}`);
  }
  const value = parseJson(json, { what, maxDepth: 64 });
  if (!isObject(value)) throw new FormatError(`${what}: expected an object, found something else`);
  return value;
}

function checkTokenId(token: string, id: JsonValue | undefined): number {
  if (typeof id !== "number" || !Number.isSafeInteger(id) || id < 0 || id >= MAX_VOCABULARY) {
    const [name, found] = [JSON.stringify(token), JSON.stringify(id) ?? "none"];
    throw new FormatError(`tokenizer.json: token ${name}: expected an id below 2^24, found ${found}`);
  }
  return id;
}

/** Regular expressions come from a file that nobody vouches for: long ones are refused. */
function checkPatterns(part: string, value: JsonValue | undefined): void {
  if (Array.isArray(value)) {
    for (const item of value) checkPatterns(part, item);
  } else if (isObject(value)) {
    for (const [key, item] of Object.entries(value)) {
      if (key === "Regex" && typeof item === "string" && item.length > MAX_PATTERN) {
        const expected = `a pattern of at most ${MAX_PATTERN} characters`;
        throw new FormatError(`tokenizer.json: ${part}: expected ${expected}, found ${item.length}`);
      }
      checkPatterns(part, item);
    }
  }
}

function isByteLevel(decoder: JsonValue | undefined): boolean {
  if (!isObject(decoder)) return false;
  const { type, decoders } = decoder;
  if (type === "ByteLevel") return true;
  return Array.isArray(decoders) && decoders.length === 1 && isByteLevel(decoders[0]);
}
