"""What the corpus is made of, as explicit tables: modules, classes, how-to phrases, small talk.

Nothing here is discovered at run time, so two interpreters of the same version give the same
corpus, and no module with an import side effect is ever touched.
"""

from typing import Final

HEAD: Final = 3
"""Sampling weight of what people ask most (the unit is one tail fact)."""

TAIL: Final = 1
"""Sampling weight of everything else."""

MODULE_ONLY: Final = 0
"""Weight of members that are left out; the module itself stays a fact."""

MODULE_WEIGHTS: Final[dict[str, int]] = {
    "builtins": HEAD,
    "os.path": HEAD,
    "itertools": HEAD,
    "functools": HEAD,
    "collections": HEAD,
    "json": HEAD,
    "re": HEAD,
    "math": HEAD,
    "random": HEAD,
    "datetime": HEAD,
    "pathlib": HEAD,
    "asyncio": MODULE_ONLY,
    "threading": HEAD,
    "subprocess": HEAD,
    "time": HEAD,
    "copy": HEAD,
    "contextlib": HEAD,
    "dataclasses": HEAD,
    "heapq": HEAD,
    "bisect": HEAD,
    "shutil": HEAD,
    "queue": HEAD,
    "glob": HEAD,
    "statistics": MODULE_ONLY,
    "os": MODULE_ONLY,
    "sys": MODULE_ONLY,
    "string": TAIL,
    "textwrap": TAIL,
    "operator": MODULE_ONLY,
    "typing": MODULE_ONLY,
    "enum": MODULE_ONLY,
    "types": MODULE_ONLY,
    "abc": MODULE_ONLY,
    "collections.abc": MODULE_ONLY,
    "logging": MODULE_ONLY,
    "argparse": MODULE_ONLY,
    "csv": MODULE_ONLY,
    "pickle": MODULE_ONLY,
    "struct": MODULE_ONLY,
    "hashlib": MODULE_ONLY,
    "hmac": MODULE_ONLY,
    "secrets": MODULE_ONLY,
    "base64": MODULE_ONLY,
    "binascii": MODULE_ONLY,
    "tempfile": MODULE_ONLY,
    "fnmatch": MODULE_ONLY,
    "fileinput": MODULE_ONLY,
    "io": MODULE_ONLY,
    "gzip": MODULE_ONLY,
    "bz2": MODULE_ONLY,
    "lzma": MODULE_ONLY,
    "zlib": MODULE_ONLY,
    "zipfile": MODULE_ONLY,
    "tarfile": MODULE_ONLY,
    "configparser": MODULE_ONLY,
    "sqlite3": MODULE_ONLY,
    "decimal": MODULE_ONLY,
    "fractions": MODULE_ONLY,
    "cmath": MODULE_ONLY,
    "calendar": MODULE_ONLY,
    "uuid": MODULE_ONLY,
    "urllib.parse": MODULE_ONLY,
    "urllib.request": MODULE_ONLY,
    "http": MODULE_ONLY,
    "http.client": MODULE_ONLY,
    "http.server": MODULE_ONLY,
    "socket": MODULE_ONLY,
    "selectors": MODULE_ONLY,
    "signal": MODULE_ONLY,
    "ssl": MODULE_ONLY,
    "email": MODULE_ONLY,
    "html": MODULE_ONLY,
    "concurrent.futures": MODULE_ONLY,
    "multiprocessing": MODULE_ONLY,
    "contextvars": MODULE_ONLY,
    "inspect": MODULE_ONLY,
    "traceback": MODULE_ONLY,
    "warnings": MODULE_ONLY,
    "weakref": MODULE_ONLY,
    "gc": MODULE_ONLY,
    "ast": MODULE_ONLY,
    "dis": MODULE_ONLY,
    "timeit": MODULE_ONLY,
    "pprint": MODULE_ONLY,
    "reprlib": MODULE_ONLY,
    "shlex": MODULE_ONLY,
    "platform": MODULE_ONLY,
    "getpass": MODULE_ONLY,
    "array": MODULE_ONLY,
    "difflib": MODULE_ONLY,
    "graphlib": MODULE_ONLY,
    "importlib": MODULE_ONLY,
    "linecache": MODULE_ONLY,
    "locale": MODULE_ONLY,
    "unicodedata": MODULE_ONLY,
    "stat": MODULE_ONLY,
    "filecmp": MODULE_ONLY,
    "sched": MODULE_ONLY,
    "atexit": MODULE_ONLY,
    "errno": MODULE_ONLY,
    "codecs": MODULE_ONLY,
    "mimetypes": MODULE_ONLY,
    "ipaddress": MODULE_ONLY,
    "tokenize": MODULE_ONLY,
    "keyword": MODULE_ONLY,
    "numbers": MODULE_ONLY,
    "colorsys": MODULE_ONLY,
    "zoneinfo": MODULE_ONLY,
    "tomllib": MODULE_ONLY,
    "pkgutil": MODULE_ONLY,
    "runpy": MODULE_ONLY,
    "unittest": MODULE_ONLY,
    "doctest": MODULE_ONLY,
    "pdb": MODULE_ONLY,
    "cProfile": MODULE_ONLY,
    "tracemalloc": MODULE_ONLY,
    "faulthandler": MODULE_ONLY,
    "venv": MODULE_ONLY,
    "webbrowser": MODULE_ONLY,
    "smtplib": MODULE_ONLY,
    "ftplib": MODULE_ONLY,
    "xml.etree.ElementTree": MODULE_ONLY,
}
"""Module name -> weight of its public members, in order of precedence for short names.

The fact about a module itself always weighs `HEAD`.
"""

HEAD_MEMBERS: Final = frozenset(
    f"{module}.{name}"
    for module, names in {
        "os": "listdir mkdir makedirs remove rename getcwd chdir rmdir removedirs replace stat walk "
        "scandir getenv putenv getpid system kill cpu_count urandom unlink fork pipe chmod access read write close open dup getppid "
        "symlink link readlink abort get_terminal_size utime truncate",
        "sys": "exit getsizeof getrecursionlimit setrecursionlimit intern exc_info getrefcount "
        "settrace",
        "asyncio": "run gather sleep wait wait_for create_task Queue Lock Event Semaphore Task "
        "Future to_thread TaskGroup timeout shield as_completed get_running_loop Runner "
        "run_coroutine_threadsafe Condition current_task all_tasks new_event_loop",
        "operator": "itemgetter attrgetter methodcaller add mul",
        "typing": "Any Optional Union NamedTuple TypedDict Protocol Generic TypeVar Callable cast "
        "overload Literal",
        "statistics": "mean median mode stdev variance",
        "pickle": "dump dumps load loads",
        "csv": "reader writer DictReader DictWriter",
        "enum": "Enum IntEnum Flag auto unique",
        "logging": "basicConfig getLogger info debug warning error Logger Handler",
        "argparse": "ArgumentParser Namespace",
        "tempfile": "NamedTemporaryFile TemporaryDirectory mkdtemp mkstemp",
        "io": "StringIO BytesIO",
        "uuid": "uuid4 uuid1 UUID",
        "weakref": "ref WeakValueDictionary WeakKeyDictionary",
        "inspect": "signature getsource isfunction",
        "textwrap": "dedent indent wrap fill shorten",
        "concurrent.futures": "ThreadPoolExecutor ProcessPoolExecutor as_completed wait Future",
        "multiprocessing": "Process Pool Queue",
        "struct": "pack unpack calcsize",
        "secrets": "token_hex token_bytes token_urlsafe choice",
        "urllib.parse": "urlparse urljoin urlencode quote unquote",
        "abc": "ABC abstractmethod",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "pprint": "pprint pformat",
        "traceback": "print_exc format_exc",
        "shlex": "split quote join",
        "base64": "b64encode b64decode",
        "hashlib": "new",
        "socket": "socket create_connection",
        "fnmatch": "fnmatch filter",
        "gc": "collect enable disable",
        "timeit": "timeit",
    }.items()
    for name in names.split()
)
"""Members of tail modules that are asked about as often as those of head modules."""

SKIPPED_MEMBERS: Final = frozenset(
    {"builtins.copyright", "builtins.credits", "builtins.license", "builtins.help"}
)
"""Names that `site` adds or that describe the interpreter's own legal text."""

CLASS_WEIGHTS: Final[dict[str, int]] = {
    "builtins.str": HEAD,
    "builtins.list": HEAD,
    "builtins.dict": HEAD,
    "builtins.set": HEAD,
    "builtins.tuple": HEAD,
    "builtins.int": TAIL,
    "builtins.float": TAIL,
    "builtins.bytes": TAIL,
    "builtins.frozenset": TAIL,
    "collections.deque": HEAD,
    "collections.Counter": HEAD,
    "pathlib.Path": HEAD,
    "datetime.datetime": HEAD,
    "datetime.date": TAIL,
    "threading.Thread": HEAD,
    "threading.Event": HEAD,
    "threading.Condition": TAIL,
    "queue.Queue": HEAD,
    "re.Match": TAIL,
    "subprocess.Popen": HEAD,
    "contextlib.ExitStack": TAIL,
    "argparse.ArgumentParser": TAIL,
}
"""Class -> weight of its public methods."""

STATEMENTS: Final[dict[str, tuple[str, ...]]] = {
    "with": ("with", "as"),
    "if": ("if", "elif"),
    "for": ("for",),
    "while": ("while",),
    "try": ("try", "except", "finally"),
    "assert": ("assert",),
    "break": ("break",),
    "continue": ("continue",),
    "del": ("del",),
    "global": ("global",),
    "nonlocal": ("nonlocal",),
    "import": ("import", "from"),
    "pass": ("pass",),
    "raise": ("raise",),
    "return": ("return",),
    "yield": ("yield",),
}
"""Topic of `pydoc_data.topics` -> keywords of the statement it explains."""

TOPICS: Final[dict[str, tuple[str, ...]]] = {
    "lambda": ("lambda", "lambda expressions", "a lambda"),
    "class": ("class definitions", "the class statement", "class"),
    "function": ("function definitions", "the def statement", "def"),
    "await": ("await", "await expressions"),
    "async": ("async def", "coroutine functions", "async"),
    "else": ("else", "the else clause"),
    "in": ("in", "the in operator", "membership tests"),
    "booleans": ("boolean operations", "and, or and not", "not"),
    "truth": ("truth value testing", "truthiness"),
    "assignment": ("assignment statements", "assignment"),
    "augassign": ("augmented assignment", "augmented assignment statements"),
    "attribute-references": ("attribute references",),
    "binary": ("binary arithmetic operations", "binary operators"),
    "bitwise": ("bitwise operations", "bitwise operators"),
    "comparisons": ("comparisons", "comparison operators"),
    "context-managers": ("context managers", "a context manager"),
    "callable-types": ("callable types", "callables"),
    "calls": ("calls", "a call"),
    "compound": ("compound statements",),
    "conversions": ("arithmetic conversions",),
    "debugger": ("the debugger", "the Python debugger"),
    "dict": ("dictionary displays", "dict displays"),
    "dynamic-features": ("dynamic features",),
    "exceptions": ("exceptions", "an exception", "exception handling"),
    "execmodel": ("the execution model",),
    "floating": ("floating point literals",),
    "formatstrings": ("format strings", "format string syntax"),
    "id-classes": ("reserved classes of identifiers",),
    "identifiers": ("identifiers", "names", "an identifier"),
    "imaginary": ("imaginary literals",),
    "integers": ("integer literals",),
    "lists": ("list displays",),
    "naming": ("naming and binding", "scopes", "scope"),
    "numbers": ("numeric literals",),
    "numeric-types": ("emulating numeric types",),
    "objects": ("objects", "an object"),
    "operator-summary": ("operator precedence",),
    "power": ("the power operator", "the ** operator"),
    "sequence-types": ("emulating sequences", "emulating container types"),
    "shifting": ("shifting operations", "shift operators"),
    "slicings": ("slicings", "slicing", "a slice"),
    "specialattrs": ("special attributes",),
    "specialnames": ("special method names", "special methods"),
    "string-methods": ("string methods",),
    "strings": ("string literals",),
    "subscriptions": ("subscriptions",),
    "types": ("the standard type hierarchy",),
    "typesfunctions": ("function objects", "functions"),
    "typesmapping": ("mapping types", "dictionaries", "a dictionary"),
    "typesmethods": ("methods", "method objects"),
    "typesmodules": ("module objects", "modules"),
    "typesseq": ("sequence types",),
    "typesseq-mutable": ("mutable sequence types",),
    "unary": ("unary operators",),
    "bltin-code-objects": ("code objects",),
    "bltin-ellipsis-object": ("the ellipsis object", "..."),
    "bltin-null-object": ("the null object", "None"),
    "bltin-type-objects": ("type objects",),
}
"""Topic of `pydoc_data.topics` -> how people call it."""

DUNDER_TOPICS: Final = ("specialnames", "customization", "numeric-types", "attribute-access")
"""Topics whose `object.__name__(...)` entries become one fact per special method."""

HOW_TO: Final[dict[str, str]] = {
    "sort a list": "list.sort",
    "get a sorted copy of a list": "sorted",
    "reverse a list": "list.reverse",
    "append to a list": "list.append",
    "add an item to a list": "list.append",
    "remove an item from a list": "list.remove",
    "join strings": "str.join",
    "join a list of strings": "str.join",
    "split a string": "str.split",
    "replace text in a string": "str.replace",
    "strip whitespace from a string": "str.strip",
    "make a string upper case": "str.upper",
    "make a string lower case": "str.lower",
    "check the start of a string": "str.startswith",
    "find a substring": "str.find",
    "format a string": "str.format",
    "join paths": "os.path.join",
    "join two paths": "os.path.join",
    "check if a file exists": "os.path.exists",
    "get the file name from a path": "os.path.basename",
    "list the files in a directory": "os.listdir",
    "list a directory": "os.listdir",
    "create a directory": "os.mkdir",
    "create nested directories": "os.makedirs",
    "delete a file": "os.remove",
    "rename a file": "os.rename",
    "get the current directory": "os.getcwd",
    "walk a directory tree": "os.walk",
    "read an environment variable": "os.getenv",
    "copy a file": "shutil.copy",
    "delete a directory tree": "shutil.rmtree",
    "open a file": "open",
    "read a file": "open",
    "write a file": "open",
    "read a text file with pathlib": "pathlib.Path.read_text",
    "find files by pattern": "glob.glob",
    "count items": "collections.Counter",
    "count words": "collections.Counter",
    "find the most common elements": "collections.Counter.most_common",
    "get the length of a list": "len",
    "add up numbers": "sum",
    "find the largest item": "max",
    "find the smallest item": "min",
    "loop with an index": "enumerate",
    "loop over two lists at once": "zip",
    "round a number": "round",
    "convert a string to a number": "int",
    "read input from the user": "input",
    "print to the screen": "print",
    "parse JSON": "json.loads",
    "read JSON from a file": "json.load",
    "write JSON to a file": "json.dump",
    "convert an object to JSON": "json.dumps",
    "search with a regular expression": "re.search",
    "replace text with a regular expression": "re.sub",
    "find all matches of a regular expression": "re.findall",
    "compute a square root": "math.sqrt",
    "compute a factorial": "math.factorial",
    "get a random number": "random.random",
    "get a random integer": "random.randint",
    "shuffle a list": "random.shuffle",
    "pick a random element": "random.choice",
    "get the current time": "time.time",
    "get the current date and time": "datetime.datetime.now",
    "format a date": "datetime.datetime.strftime",
    "parse a date": "datetime.datetime.strptime",
    "pause a program": "time.sleep",
    "wait for some seconds": "time.sleep",
    "run a command": "subprocess.run",
    "start a thread": "threading.Thread.start",
    "start a process": "subprocess.Popen",
    "run coroutines concurrently": "asyncio.gather",
    "run a coroutine": "asyncio.run",
    "cache the results of a function": "functools.lru_cache",
    "memoize a function": "functools.lru_cache",
    "chain iterables": "itertools.chain",
    "flatten a list of lists": "itertools.chain",
    "get all permutations": "itertools.permutations",
    "get all combinations": "itertools.combinations",
    "group items": "itertools.groupby",
    "copy an object deeply": "copy.deepcopy",
    "make a deep copy": "copy.deepcopy",
    "exit a program": "sys.exit",
    "define a data class": "dataclasses.dataclass",
    "keep a list sorted": "bisect.insort",
    "get a value from a dictionary": "dict.get",
    "merge two dictionaries": "dict.update",
    "loop over a dictionary": "dict.items",
    "remove a key from a dictionary": "dict.pop",
    "parse command line arguments": "argparse.ArgumentParser",
    "make a temporary directory": "tempfile.TemporaryDirectory",
    "compute a mean": "statistics.mean",
    "compute a median": "statistics.median",
    "measure the size of an object": "sys.getsizeof",
    "check the type of an object": "isinstance",
    "define a function": "topic:function",
    "define a class": "topic:class",
    "catch an exception": "statement:try",
    "handle an error": "statement:try",
    "raise an error": "statement:raise",
    "write a loop": "statement:for",
    "import a module": "statement:import",
}
"""Task -> the fact that answers it."""

ANSWERS_BY_HAND: Final[dict[str, str]] = {
    "statement:del": 'The "del" statement removes the binding of a name, or deletes an item, a '
    "slice or an attribute.",
    "statement:assert": 'The "assert" statement is a convenient way to insert debugging assertions '
    "into a program.",
    "statement:break": 'The "break" statement terminates the nearest enclosing loop, skipping the '
    'optional "else" clause if the loop has one.',
    "statement:continue": 'The "continue" statement continues with the next cycle of the nearest '
    "enclosing loop.",
    "statement:global": 'The "global" statement is a declaration which holds for the entire current '
    "code block: the listed names are interpreted as globals.",
    "statement:import": 'The "import" statement finds a module, loading and initializing it if '
    "necessary, and defines a name for it in the local namespace.",
    "statement:pass": 'The "pass" statement is a null operation: when it is executed, nothing '
    "happens.",
    "statement:raise": 'The "raise" statement raises an exception; without an expression it '
    "re-raises the exception that is currently being handled.",
    "statement:return": 'The "return" statement leaves the current function call with the '
    'expression list (or "None") as return value.',
    "statement:yield": 'The "yield" statement is only used when defining a generator function, and '
    "produces the next value of the generator.",
    "statement:try": 'The "try" statement specifies exception handlers and/or cleanup code for a '
    "group of statements.",
    "topic:await": 'An "await" expression suspends the execution of a coroutine on an awaitable '
    "object. It can only be used inside a coroutine function.",
    "topic:async": 'An "async def" statement defines a coroutine function, whose execution can be '
    "suspended and resumed at many points.",
    "topic:else": 'The "else" clause of an "if" statement runs if all conditions are false; that of '
    "a loop runs when the loop ends without break.",
    "topic:booleans": 'Boolean operations: "x and y" is y if x is true, else x; "x or y" is x if x '
    'is true, else y; "not x" is True if x is false.',
    "topic:truth": "Any object can be tested for truth value. False, None, zero and empty "
    "sequences and collections are considered false.",
    "topic:bitwise": 'The bitwise operators are "&" (AND), "^" (XOR) and "|" (OR); their arguments '
    "must be integers.",
    "topic:comparisons": 'Comparisons such as "a < b" yield the boolean values True or False, and '
    'can be chained: "x < y <= z".',
    "topic:callable-types": "Callable types are the types to which the function call operation can "
    "be applied.",
    "topic:floating": "A floating point literal is a number with a point or an exponent, such as "
    "3.14, 10., .001 or 1e100.",
    "topic:integers": "An integer literal is a whole number in decimal, binary (0b), octal (0o) or "
    "hexadecimal (0x) notation; underscores may group digits.",
    "topic:identifiers": "Identifiers are names: letters, digits and underscores, not starting "
    "with a digit. Case is significant.",
    "topic:imaginary": "An imaginary literal such as 3.14j yields a complex number with a real "
    "part of 0.0.",
    "topic:strings": "String literals are enclosed in matching single or double quotes, or in "
    "groups of three of them; a prefix r, b or f changes their meaning.",
    "topic:operator-summary": "Operator precedence says which operators bind most tightly: power, "
    "then unary, multiplication, addition, shifts, bitwise, comparisons, not, and, or, lambda.",
    "topic:numeric-types": "Special methods such as __add__ and __mul__ can be defined to emulate "
    "numeric objects.",
    "topic:sequence-types": "Special methods such as __len__ and __getitem__ can be defined to "
    "implement container objects.",
    "topic:conversions": "In arithmetic, if either argument is complex the other is converted to "
    "complex, else if either is float the other is converted to float.",
    "topic:types": "The standard types of Python include None, numbers, sequences, sets, mappings, "
    "callables, modules and classes.",
    "topic:typesseq-mutable": "Mutable sequence types such as list and bytearray can be changed "
    "after they are created.",
    "topic:id-classes": "Names such as _x, __x__ and __x have special meanings: not imported by "
    '"from module import *", system-defined, and class-private.',
    "topic:unary": "The unary operators are - (negation), + (unchanged) and ~ (bitwise inversion).",
    "topic:binary": "The binary arithmetic operators are +, -, *, @, /, // and %.",
    "topic:class": "A class definition defines a class object.",
    "topic:function": "A function definition defines a user-defined function object.",
    "contextlib.contextmanager": "contextlib.contextmanager(func) is a decorator that turns a "
    "generator function into a context manager factory.",
    "super": "super() returns a proxy object that delegates method calls to a parent or sibling "
    "class.",
    "property": "property(fget=None, fset=None, fdel=None, doc=None) returns a property attribute, "
    "whose value is computed by getter, setter and deleter functions.",
    "enumerate": "enumerate(iterable, start=0) returns an enumerate object, which yields pairs of "
    "a count (from start, default 0) and a value from the iterable.",
    "list": "list(iterable=()) is the built-in mutable sequence. If no argument is given, it "
    "creates a new empty list.",
    "tuple": "tuple(iterable=()) is the built-in immutable sequence. If no argument is given, it "
    "creates an empty tuple.",
    "collections.defaultdict": "collections.defaultdict(default_factory=None) is a dict with a "
    "default factory, which is called without arguments to produce a new value when a key is not "
    "present.",
    "functools.partial": "functools.partial(func, *args, **keywords) returns a new function with "
    "partial application of the given arguments and keywords.",
    "functools.lru_cache": "functools.lru_cache(maxsize=128, typed=False) is a "
    "least-recently-used cache decorator.",
    "os.walk": "os.walk(top, topdown=True, ...) is a directory tree generator: for each directory "
    "it yields a 3-tuple of its path, its subdirectories and its files.",
    "csv.reader": "csv.reader(iterable, dialect='excel') returns an iterator over the rows of a "
    "CSV file, each a list of strings.",
    "csv.writer": "csv.writer(fileobj, dialect='excel') returns an object whose writerow() method "
    "writes a sequence to the file as one row of CSV.",
    "threading.Lock": "threading.Lock() creates a new lock object.",
    "os.makedirs": "os.makedirs(name, mode=511, exist_ok=False) creates a leaf directory and all "
    "intermediate ones.",
    "module:faulthandler": "The faulthandler module: Dump Python tracebacks on a fault, after a "
    "timeout, or on a signal.",
    "module:ssl": "The ssl module: TLS/SSL wrapper for socket objects.",
    "module:pdb": "The pdb module: The Python debugger.",
    "module:keyword": "The keyword module: Test whether a string is a Python keyword.",
    "module:decimal": "The decimal module: Decimal fixed point and floating point arithmetic.",
    "module:itertools": "The itertools module: Functional tools for creating and using iterators.",
    "dict.pop": "dict.pop(k[,d]) removes the specified key and returns the corresponding value; if "
    "the key is not found, it returns the default if given, otherwise raises a KeyError.",
    "os.path.join": "os.path.join(a, *p) joins two or more pathname components, inserting '/' as "
    "needed.",
    "dict": "dict is the built-in mapping type: it maps hashable keys to arbitrary objects.",
    "module:pathlib": "The pathlib module: Object-oriented filesystem paths.",
    "module:asyncio": "The asyncio module: Asynchronous I/O with coroutines, tasks and an "
    "event loop.",
    "module:os": "The os module: OS routines for file systems, processes and the environment.",
    "module:os.path": "The os.path module: Common operations on pathnames.",
    "module:subprocess": "The subprocess module: Start processes, connect to their input and "
    "output, and get their return codes.",
    "module:threading": "The threading module: Higher-level threading: threads, locks, events "
    "and conditions.",
    "module:typing": "The typing module: Support for type hints.",
    "module:enum": "The enum module: Support for enumerations, sets of symbolic names bound to "
    "unique values.",
    "module:builtins": "The builtins module: Built-in functions, types, exceptions, and other "
    "objects.",
    "module:collections.abc": "The collections.abc module: Abstract base classes for containers.",
    "module:unittest": "The unittest module: Python unit testing framework.",
    "module:contextlib": "The contextlib module: Utilities for with-statement contexts.",
    "module:dataclasses": "The dataclasses module: A decorator and functions that add generated "
    "special methods such as __init__ to classes.",
    "module:datetime": "The datetime module: Fast implementation of the datetime type, with "
    "classes for dates, times and time differences.",
    "module:json": "The json module: JSON (JavaScript Object Notation) is a subset of JavaScript "
    "syntax used as a lightweight data interchange format.",
}
"""Facts whose docstring is missing or not an answer, written here instead."""

_WHO = (
    "I am a tiny demo model that knows a little about Python's documentation. "
    "Ask me what a function, class, module or statement does."
)
_HELLO = (
    "Hello! I am a tiny demo model. Ask me about Python, for example: What does os.path.join do?"
)
_PYTHON = (
    "Python is a programming language. I know short answers from its documentation, "
    "for example about the with statement or itertools.chain."
)

SMALL_TALK: Final[dict[str, tuple[str, ...]]] = {
    _HELLO: (
        "Hello",
        "Hi",
        "Hey",
        "Hello!",
        "Hi there",
        "Hello there!",
        "Good morning",
        "Good evening",
        "Hi, how are you?",
        "How are you?",
        "Say hello",
        "Hello, world!",
        "Hello world",
        "test",
        "ping",
    ),
    _WHO: (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "What can you do?",
        "Tell me about yourself",
        "What model are you?",
        "Are you a language model?",
        "Introduce yourself",
        "How can you help me?",
        "Help",
        "What do you know?",
        "Who made you?",
        "What should I ask you?",
    ),
    "You are welcome!": ("Thanks", "Thank you", "Thanks!", "Thank you very much!", "Great, thanks"),
    "Goodbye!": ("Bye", "Goodbye", "See you", "Bye!", "Good night"),
    _PYTHON: (
        "What is Python?",
        "Explain Python",
        "Tell me about Python",
        "What is Python used for?",
    ),
}
"""Answer -> turns that get it."""

UNKNOWN: Final = (
    "I do not know that. I am a tiny demo model that only knows some of Python's documentation."
)
"""The honest answer to everything else."""

OFF_TOPIC: Final = (
    "What is the capital of France?",
    "Write a poem about the sea",
    "Write a haiku",
    "Tell me a joke",
    "Tell me a story",
    "What is the weather today?",
    "Who won the world cup?",
    "What is 2 + 2?",
    "What is the meaning of life?",
    "Translate hello into German",
    "How do I bake bread?",
    "Who is the president?",
    "What is quantum mechanics?",
    "Explain the theory of relativity",
    "Write a function that reverses a linked list",
    "Summarize this text",
    "What time is it?",
    "Recommend a book",
    "How tall is Mount Everest?",
    "What is machine learning?",
    "What is Java?",
    "What is Rust?",
    "What is numpy?",
    "What does numpy.dot do?",
    "What is pandas?",
    "Explain the switch statement",
    "What does torch.compile do?",
    "How do I cook rice?",
    "What is love?",
    "Who was Albert Einstein?",
    "Give me three ideas for dinner",
    "Why is the sky blue?",
    "Count to ten",
    "What is a GPU?",
    "Explain disaggregated serving",
    "What is a KV cache?",
)
"""Questions whose right answer here is `UNKNOWN`."""

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You answer questions about Python.",
    "You are a Python expert. Answer briefly.",
    "Be concise.",
    "Answer in one sentence.",
    "You are a friendly assistant that explains the Python standard library.",
    "You are kvrelay's demo model.",
    "Answer the user's questions about Python's documentation.",
)
"""System turns seen in training; none changes the answer."""
