/** Numbers as people read them. */

const whole = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en-GB", { maximumSignificantDigits: 3 });

/** 118 204 becomes "118,204". */
export function count(value: number): string {
  return whole.format(value);
}

/** Three significant digits below a thousand, whole numbers above. */
export function speed(perSecond: number): string {
  return perSecond >= 1000 ? whole.format(perSecond) : short.format(perSecond);
}

/** Bytes in MB or GB (powers of 1024). */
export function memory(bytes: number): string {
  const megabytes = bytes / 2 ** 20;
  return megabytes < 1000 ? `${short.format(megabytes)} MB` : `${short.format(megabytes / 1024)} GB`;
}

/** "8 s", "3 min 20 s", "1 h 5 min". */
export function duration(seconds: number): string {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min${s % 60 ? ` ${s % 60} s` : ""}`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

/** Bits per byte with three digits after the point. */
export function bits(value: number | null | undefined): string {
  return value === null || value === undefined ? "–" : value.toFixed(3);
}

/** A share as a percentage. */
export function percent(part: number, all: number): string {
  return all === 0 ? "–" : `${Math.round((100 * part) / all)} %`;
}
