"""The tables that tasks are made of: words, people, places, units, functions, subjects of small talk."""

from __future__ import annotations

__all__ = ["AGES", "CAPITALS", "DAYS", "MONTHS", "NAMES", "SUBJECTS", "TOOLS", "UNITS", "WORDS"]

WORDS = (
    "address", "array", "base", "block", "buffer", "cache", "change", "child", "class", "client", "code", "command",
    "copy", "date", "dict", "document", "element", "entry", "error", "event", "example", "field", "file", "flag",
    "float", "frame", "function", "group", "handle", "header", "host", "index", "input", "integer", "item", "key",
    "level", "line", "list", "loader", "lock", "mark", "memory", "message", "method", "mode", "module", "name",
    "node", "number", "object", "option", "order", "output", "package", "path", "point", "port", "process", "queue",
    "range", "request", "result", "root", "script", "server", "shape", "socket", "source", "stack", "state", "string",
    "table", "task", "test", "thread", "time", "token", "tree", "type", "user", "value", "version", "warning",
    "width", "window",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Brazil": "Brasilia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Greece": "Athens", "Hungary": "Budapest", "India": "New Delhi", "Ireland": "Dublin", "Italy": "Rome",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Russia": "Moscow", "Spain": "Madrid", "Sweden": "Stockholm", "Turkey": "Ankara", "Vietnam": "Hanoi",
}  # fmt: skip
NAMES = (
    "Adam", "Alice", "Anna", "Ben", "Bob", "Carl", "Clara", "David", "Emma", "Eric", "Eva", "Frank", "Fred", "Grace",
    "Guido", "Ian", "Jack", "Jane", "John", "Julia", "Kate", "Leo", "Lisa", "Maria", "Mark", "Mary", "Max", "Nina",
    "Oscar", "Paul", "Peter", "Rosa", "Sam", "Sara", "Tim", "Tom",
)  # fmt: skip
AGES = range(18, 90)
UNITS = (
    ("km", "m", 1000), ("kg", "g", 1000), ("s", "ms", 1000), ("l", "ml", 1000),
    ("m", "cm", 100), ("l", "cl", 100), ("cm", "mm", 10), ("dl", "cl", 10),
)  # fmt: skip
TOOLS = {
    "get_weather": "What is the weather in {city}?",
    "get_time": "What time is it in {city}?",
    "find_hotel": "Find a hotel in {city}.",
    "show_map": "Show me a map of {city}.",
    "get_news": "What is new in {city}?",
    "book_train": "Book a train to {city}.",
}
SUBJECTS = (
    "my cat", "the moon", "music", "love", "the weather", "football", "dinner", "history", "quantum physics",
    "politics", "a good book", "the sea", "my job", "chess", "money", "black holes", "the news", "cars", "philosophy",
    "the stock market", "Shakespeare", "climate change", "my garden", "art", "space travel", "whales", "coffee",
    "Rome", "evolution", "sleep", "a cake", "the war", "religion", "my computer", "a movie", "the president", "taxes",
    "a dog", "sports", "winter", "the internet", "friendship", "dinosaurs", "the universe", "a car", "my mother",
    "happiness", "school", "the law", "bread", "a house", "robots", "a river", "poetry", "health", "the king",
    "time travel", "my boss", "a joke", "yoga",
)  # fmt: skip
