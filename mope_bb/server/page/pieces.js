/** The piece of an answer that a token is, for people. `entry` is of the field `trace`. */

export const END = "<end>";

/** Whether this token ended the answer. */
export function isEnd(entry) {
  return entry.bytes.length === 0;
}

/** The piece as the server writes it in the experts' lists; half a character is U+FFFD. */
export function pieceOf(entry) {
  return isEnd(entry) ? END : new TextDecoder().decode(new Uint8Array(entry.bytes));
}

/** Spaces and line ends that can be seen. */
export function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}
