/**
 * Reads JSON text from files that nobody vouches for.
 *
 * `JSON.parse` keeps the last of two equal keys without a word, reports no line, and refuses the `Infinity`
 * that Python writes into model configurations. This reader follows RFC 8259 to the letter,
 * refuses duplicate keys and deep nesting, and accepts non-finite numbers only when asked to.
 * Tested on the JSONTestSuite corpus in test/null/json.test.ts.
 */
import { FormatError } from "../tensor/errors.ts";

export type JsonValue = null | boolean | number | string | JsonValue[] | JsonObject;
export interface JsonObject {
  [key: string]: JsonValue;
}

export interface JsonOptions {
  /** What the text is, for messages: usually the file name. Default "JSON text". */
  readonly what?: string;
  /** Deepest nesting of arrays and objects; default 256, well below what overflows the stack. */
  readonly maxDepth?: number;
  /** Accept bare Infinity, -Infinity and NaN as values, as Python's writer emits them. Default false. */
  readonly nonFinite?: boolean;
  /** Two members of one object with the same key: refuse (default), or keep the last as JSON.parse does. */
  readonly duplicateKeys?: "refuse" | "last";
}

/** True for a JSON object, as opposed to an array, a string, a number, a boolean or null. */
export function isObject(value: JsonValue | undefined): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * Parses one JSON value. Bytes must be UTF-8 without a byte order mark.
 * Throws FormatError with line and column for anything that is not exactly one JSON value.
 */
export function parseJson(input: string | Uint8Array, options: JsonOptions = {}): JsonValue {
  const what = options.what ?? "JSON text";
  return new Reader(typeof input === "string" ? input : decodeUtf8(input, what), what, options).document();
}

/** Text of UTF-8 bytes; a byte order mark is kept. Throws FormatError for bytes that are not UTF-8. */
export function decodeUtf8(bytes: Uint8Array, what: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new FormatError(`${what}: expected UTF-8 text, found bytes that are not UTF-8`);
  }
}

const QUOTE = 34;
const BACKSLASH = 92;
const ESCAPES: Readonly<Record<string, string>> = {
  '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t",
};
const NUMBER = /-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y;
const WORD = /-?[A-Za-z]+/y;

class Reader {
  private at = 0;
  private depth = 0;
  private readonly text: string;
  private readonly what: string;
  private readonly maxDepth: number;
  private readonly nonFinite: boolean;
  private readonly refuseDuplicates: boolean;

  constructor(text: string, what: string, options: JsonOptions) {
    this.text = text;
    this.what = what;
    this.maxDepth = options.maxDepth ?? 256;
    this.nonFinite = options.nonFinite ?? false;
    this.refuseDuplicates = options.duplicateKeys !== "last";
  }

  document(): JsonValue {
    const value = this.value();
    this.space();
    if (this.at < this.text.length) this.fail("the end of the text after one value");
    return value;
  }

  private value(): JsonValue {
    this.space();
    switch (this.text[this.at]) {
      case "{":
        return this.nested(() => this.object());
      case "[":
        return this.nested(() => this.array());
      case '"':
        return this.string();
      default:
        return this.scalar();
    }
  }

  private nested<T>(read: () => T): T {
    if (this.depth === this.maxDepth) this.fail(`nesting of at most ${this.maxDepth} levels`);
    this.depth++;
    this.at++;
    const value = read();
    this.depth--;
    return value;
  }

  private object(): JsonObject {
    const object: JsonObject = {};
    this.space();
    if (this.take("}")) return object;
    for (;;) {
      this.space();
      const start = this.at;
      if (this.text[start] !== '"') this.fail("a key in double quotes");
      const key = this.string();
      if (this.refuseDuplicates && Object.hasOwn(object, key)) {
        this.at = start;
        this.fail(`each key once, found ${JSON.stringify(key)} a second time`, true);
      }
      this.space();
      if (!this.take(":")) this.fail("':' after a key");
      const value = this.value();
      // Assigning to __proto__ would change the prototype instead of making a member.
      if (key === "__proto__") {
        Object.defineProperty(object, key, { value, writable: true, enumerable: true, configurable: true });
      } else {
        object[key] = value;
      }
      this.space();
      if (this.take("}")) return object;
      if (!this.take(",")) this.fail("',' or '}'");
    }
  }

  private array(): JsonValue[] {
    const items: JsonValue[] = [];
    this.space();
    if (this.take("]")) return items;
    for (;;) {
      items.push(this.value());
      this.space();
      if (this.take("]")) return items;
      if (!this.take(",")) this.fail("',' or ']'");
    }
  }

  private string(): string {
    const { text } = this;
    let from = this.at + 1;
    let out = "";
    for (let i = from; i < text.length; i++) {
      const code = text.charCodeAt(i);
      if (code === QUOTE) {
        this.at = i + 1;
        return out + text.slice(from, i);
      }
      if (code < 32) {
        this.at = i;
        this.fail("an escape for a control character in a string");
      }
      if (code !== BACKSLASH) continue;
      out += text.slice(from, i);
      this.at = ++i;
      const letter = text[i] ?? "";
      const plain = Object.hasOwn(ESCAPES, letter) ? ESCAPES[letter]! : undefined;
      if (plain !== undefined) {
        out += plain;
      } else if (letter === "u" && /^[0-9a-fA-F]{4}$/.test(text.slice(i + 1, i + 5))) {
        out += String.fromCharCode(Number.parseInt(text.slice(i + 1, i + 5), 16));
        i += 4;
      } else {
        this.fail("one of \" \\ / b f n r t or u with four hexadecimal digits after a backslash");
      }
      from = i + 1;
    }
    this.at = text.length;
    return this.fail("the closing quote of a string");
  }

  private scalar(): JsonValue {
    NUMBER.lastIndex = this.at;
    const number = NUMBER.exec(this.text)?.[0];
    if (number !== undefined) {
      this.at += number.length;
      return Number(number);
    }
    WORD.lastIndex = this.at;
    const word = WORD.exec(this.text)?.[0] ?? "";
    const value = this.named(word);
    if (value === undefined) return this.fail("a value");
    this.at += word.length;
    return value;
  }

  private named(word: string): JsonValue | undefined {
    switch (word) {
      case "true":
        return true;
      case "false":
        return false;
      case "null":
        return null;
      case "Infinity":
        return this.nonFinite ? Infinity : undefined;
      case "-Infinity":
        return this.nonFinite ? -Infinity : undefined;
      case "NaN":
        return this.nonFinite ? NaN : undefined;
      default:
        return undefined;
    }
  }

  private space(): void {
    for (;;) {
      const code = this.text.charCodeAt(this.at);
      if (code !== 32 && code !== 10 && code !== 13 && code !== 9) return;
      this.at++;
    }
  }

  private take(letter: string): boolean {
    if (this.text[this.at] !== letter) return false;
    this.at++;
    return true;
  }

  private fail(expected: string, complete = false): never {
    const before = this.text.slice(0, this.at);
    const line = before.split("\n").length;
    const column = this.at - before.lastIndexOf("\n");
    const rest = this.text.slice(this.at, this.at + 12);
    const found = rest === "" ? "the end of the text" : JSON.stringify(rest);
    const message = complete ? expected : `${expected}, found ${found}`;
    throw new FormatError(`${this.what}: line ${line}, column ${column}: expected ${message}`);
  }
}
