"""The least that a ClientApp can do: it sends the message back. For `scripts/bench/round.py`."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Sends the content back."""
    return Message(message.content, reply_to=message)
